"""Images per second of extraction with net D, beside its peers on the same photographs, layer and
weights, on a CPU.

    python -m benchmarks.extraction --photos DIR [--part net] [--repeats 5] [--thingsvision PYTHON]
    python -m benchmarks.extraction --photos DIR --part plan --plan mini:112,136,160

net       the forward pass alone, to fc7, on batches of one shape: ours, OpenVINO in bfloat16 (where
          it is installed), PyTorch's modules in bfloat16, channels-last.
pipeline  from JPEG to feature file, fc7 at each Q of --scales: the share of the time that the same
          batches take alone.
crop      the 224 centre crop at Q = 256 to fc7: ours, torchvision's feature extractor and timm's
          vgg16 behind a DataLoader with a process a core, thingsvision (--thingsvision: the Python
          of an environment that has it).
dense     the average map over the whole image at the three scales: ours, and the obvious loop over
          images and scales with torchvision's vgg16 in float32, FC layers turned into convolutions;
          to pool5 and to fc7.
plan      the time that `--dry-run` expects beside the time that the extraction takes, in turns.

Random weights (speed doesn't depend on them), the same on each side, in a file of torchvision's
layout. Sides take turns; medians; least cosine of the outputs to float32's, which must be 0.999.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vggfeat.machine import CORES
from vggfeat.start import settle
from vggfeat.terminal import columns, err, out

settle()  # as the command does; for all sides

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import vggfeat  # noqa: E402
from vggfeat import datasets  # noqa: E402
from vggfeat.batches import by_shape  # noqa: E402
from vggfeat.decode import read_rgb  # noqa: E402
from vggfeat.describe import describe, describe_all, description_of  # noqa: E402
from vggfeat.extract import extract  # noqa: E402
from vggfeat.images import centre_crop, smallest_side  # noqa: E402
from vggfeat.look import look  # noqa: E402
from vggfeat.plan import PLANNED, plan  # noqa: E402
from vggfeat.weights import Network  # noqa: E402

Sides = dict[str, Callable[[], np.ndarray]]
Rows = list[dict[str, Any]]
SHAPES = ((8, 224, 224), (4, 256, 341), (1, 512, 683))
LEAST_COSINE = 0.999


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def in_turns(sides: Sides, repeats: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median seconds and the output of each side; a first round, which warms up, doesn't count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs = {}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            outputs[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, outputs


def report(
    table: Any,
    what: str,
    images: int,
    seconds: dict[str, float],
    outputs: dict[str, np.ndarray],
    like: str,
) -> Rows:
    """A line a side: images/s, ours as a multiple of it, least cosine to the output `like`."""
    rows = []
    for name, value in seconds.items():
        cosine = least_cosine(outputs[name], outputs[like])
        if cosine < LEAST_COSINE:
            raise SystemExit(
                f"{what}: the output of {name} differs from {like}'s: least cosine {cosine:.5f}"
            )
        rate, ratio = images / value, value / seconds["ours"]
        row = {"what": what, "side": name, "images_per_s": rate, "ratio": ratio, "cosine": cosine}
        rows.append(row)
        if name != like or name != "ours":
            table.add_row(what, name, f"{rate:.2f}", f"{ratio:.2f}", f"{cosine:.6f}")
    return rows


def plain(network: Network, precision: torch.dtype) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """PyTorch's modules one after the other, FC layers as convolutions with weights of their own;
    to fc7's mean.
    """
    module = copy.deepcopy(network.vgg()).to(precision).to(memory_format=torch.channels_last)
    fcs: list[torch.nn.Module] = []
    for fc, k in ((module.classifier[0], 7), (module.classifier[3], 1)):
        assert isinstance(fc, torch.nn.Linear)
        conv = torch.nn.Conv2d(fc.in_features // k**2, fc.out_features, k).to(precision)
        conv.load_state_dict({"weight": fc.weight.view(conv.weight.shape), "bias": fc.bias})
        fcs += [conv, torch.nn.ReLU()]
    whole = torch.nn.Sequential(*module.features, *fcs).to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def run(x_NCHW: torch.Tensor, until: str) -> torch.Tensor:
        y: torch.Tensor = (whole if until == "fc7" else whole[:31])(x_NCHW.to(precision))
        return y.mean((2, 3), dtype=torch.float32)

    return run


def ours_of(network: Network, images_NHWC: torch.Tensor) -> np.ndarray:
    return describe(network, images_NHWC, "fc7", False).numpy()


def numbers(
    modules: Callable[[torch.Tensor, str], torch.Tensor], x_NCHW: torch.Tensor
) -> np.ndarray:
    return modules(x_NCHW, "fc7").numpy()


def net_alone(table: Any, network: Network, exact: Network, repeats: int) -> Rows:
    rows = []
    modules = plain(exact, torch.bfloat16)
    reference = plain(exact, torch.float32)
    for n, h, w in SHAPES:
        images = torch.randint(
            0, 256, (n, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        x_NCHW = network.preprocessing(images)
        sides: Sides = {
            "ours": partial(ours_of, network, images),
            "modules": partial(numbers, modules, x_NCHW),
        }
        try:
            sides["OpenVINO"] = openvino(exact, x_NCHW)
        except ImportError:
            err.print("OpenVINO is not installed: left out")
        seconds, outputs = in_turns(sides, repeats)
        outputs["float32"] = numbers(reference, x_NCHW)
        rows += report(table, f"{n} x {h}x{w}", n, seconds, outputs, "float32")
    return rows


def openvino(exact: Network, x_NCHW: torch.Tensor) -> Callable[[], np.ndarray]:
    import openvino as ov

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = exact.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean: torch.Tensor = self.net(x, "fc7").mean((2, 3))
            return mean

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ov.convert_model(
            Mean().eval(), example_input=torch.zeros(x_NCHW.shape), input=[list(x_NCHW.shape)]
        )
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(
        model, "CPU", settings | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    x = x_NCHW.contiguous().numpy()
    return lambda: compiled(x)[0]


def pipeline(
    table: Any, network: Network, folder: Path, scales: tuple[int, ...], repeats: int
) -> Rows:
    """Whole extractions, and each time their batches again, from memory."""
    items = datasets.load("folder", folder)
    rows = []
    for q in scales:
        shares, rates = [], []
        for turn in range(repeats + 1):
            batches: list[torch.Tensor] = []

            def record(*settings: Any, batches: Any = batches, **more: Any) -> torch.Tensor:
                batches.append(settings[1])
                return describe(*settings, **more)

            with (
                patch("vggfeat.extract.describe", record),
                tempfile.TemporaryDirectory() as temporary,
            ):
                began = time.perf_counter()
                extract(items, network, Path(temporary) / "f.h5", scales=(q,), mirror=False)
                whole = time.perf_counter() - began
            began = time.perf_counter()
            for images_NHWC in batches:
                describe(network, images_NHWC, "fc7", False)
            alone = time.perf_counter() - began
            if turn:
                shares.append(alone / whole)
                rates.append(len(items) / whole)
        rate, share = statistics.median(rates), statistics.median(shares)
        rows.append({"what": f"Q={q}", "images_per_s": rate, "share": share})
        table.add_row(f"Q={q}, {len(items)} photographs", f"{rate:.2f}", f"{100 * share:.0f} %")
    return rows


class Crops(Dataset[torch.Tensor]):
    """What a user writes: decode, resize, crop, normalise."""

    def __init__(self, photos: list[Path], network: Network) -> None:
        self.photos, self.network = photos, network

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = centre_crop(smallest_side(read_rgb(self.photos[i]), 256), 224)
        return self.network.preprocessing(torch.from_numpy(image)[None])[0].contiguous()


def crop(
    table: Any,
    network: Network,
    exact: Network,
    photos: list[Path],
    file: Path,
    python: str | None,
    repeats: int,
) -> Rows:
    import timm
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    state = exact.module.state_dict()
    vgg16 = torchvision.models.vgg16(weights=None).eval()
    vgg16.load_state_dict(state)
    extractor = create_feature_extractor(vgg16, {"classifier.4": "fc7"})
    backbone = timm.create_model("vgg16", pretrained=False, num_classes=0).eval()
    # its FC layers are convolutions
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    renamed = {
        key.replace("classifier.0", "pre_logits.fc1").replace(
            "classifier.3", "pre_logits.fc2"
        ): value
        for key, value in state.items()
    }
    backbone.load_state_dict({key: renamed[key].view(shape) for key, shape in shapes.items()})

    def loaded(model: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        loader = DataLoader(Crops(photos, exact), batch_size=8, num_workers=torch.get_num_threads())
        with torch.inference_mode():
            return torch.cat([model(x) for x in loader]).numpy()

    def ours() -> np.ndarray:
        got = {
            i: value
            for i, _, value in by_shape(
                lambda i: centre_crop(smallest_side(read_rgb(photos[i]), 256), 224),
                lambda i: (224, 224),
                range(len(photos)),
                (224,),
                lambda x: describe(network, x, "fc7", False),
                network.device,
                workers=torch.get_num_threads(),
            )
        }
        return np.stack([np.asarray(got[i]) for i in range(len(photos))])

    sides = {
        "ours": ours,
        "torchvision": lambda: loaded(lambda x: extractor(x)["fc7"]),
        "timm": lambda: loaded(backbone),
    }
    seconds, outputs = in_turns(sides, repeats)
    rows = report(table, "224 crop", len(photos), seconds, outputs, "torchvision")
    if python:
        # its own resize and crop round otherwise than ours: its outputs are held against
        # torchvision's after those
        transform = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
        with torch.inference_mode():
            crops = [transform(Image.open(photo).convert("RGB"))[None] for photo in photos]
            own = torch.cat([extractor(x)["fc7"] for x in crops]).numpy()
        taken, found = thingsvision(python, photos, file, repeats)
        outputs = {"ours": own, "thingsvision": found}
        both = {"ours": seconds["ours"], "thingsvision": taken}
        rows += report(table, "224 crop", len(photos), both, outputs, "ours")[1:]
    return rows


THINGSVISION = """
import sys, time, statistics, numpy as np, torch
from thingsvision import get_extractor
from thingsvision.utils.data import ImageDataset, DataLoader
folder, weights, repeats, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))
e = get_extractor("vgg16", source="torchvision", device="cpu", pretrained=False)
e.model.load_state_dict(torch.load(weights)); e.model.eval()
seconds = []
for turn in range(int(repeats) + 1):
    began = time.perf_counter()
    transforms = e.get_transformations(resize_dim=256, crop_dim=224)
    where = dict(root=folder, out_path=out + ".names")
    data = ImageDataset(backend=e.get_backend(), transforms=transforms, **where)
    batches = DataLoader(dataset=data, batch_size=8, backend=e.get_backend())
    features = e.extract_features(batches=batches, module_name="classifier.4", flatten_acts=False)
    seconds.append(time.perf_counter() - began)
np.save(out, features)
print(statistics.median(seconds[1:]))
"""


def thingsvision(
    python: str, photos: list[Path], file: Path, repeats: int
) -> tuple[float, np.ndarray]:
    """In an environment of its own, after the others: it needs another PyTorch."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos" / "all"
        folder.mkdir(parents=True)
        for i, photo in enumerate(photos):
            (folder / f"{i:05d}{photo.suffix}").symlink_to(photo.resolve())
        result = Path(temporary) / "features.npy"
        words = [folder.parent, file, repeats, torch.get_num_threads(), result]
        ran = subprocess.run(
            [python, "-c", THINGSVISION, *map(str, words)], capture_output=True, text=True
        )
        if ran.returncode:
            raise SystemExit(f"thingsvision: {ran.stderr[-2000:]}")
        return float(ran.stdout.splitlines()[-1]), np.load(result)


def dense(
    table: Any,
    network: Network,
    exact: Network,
    photos: list[Path],
    scales: tuple[int, ...],
    repeats: int,
) -> Rows:
    run = plain(exact, torch.float32)
    rows = []
    for layer in ("pool5", "fc7"):
        description = description_of(network, layer, scales, mirror=False)

        def ours(description: Any = description) -> np.ndarray:
            got = dict(describe_all(network, photos, description, workers=torch.get_num_threads()))
            return np.stack([np.asarray(got[i]) for i in range(len(photos))])

        def loop(layer: str = layer) -> np.ndarray:
            described = []
            for photo in photos:
                image = read_rgb(photo)
                small = [torch.from_numpy(smallest_side(image, q))[None] for q in scales]
                described.append([run(exact.preprocessing(x), layer)[0].numpy() for x in small])
            return np.asarray(described)

        seconds, outputs = in_turns({"ours": ours, "loop": loop}, repeats)
        rows += report(
            table, f"{layer}, Q={','.join(map(str, scales))}", len(photos), seconds, outputs, "loop"
        )
    return rows


PLANS = (
    "mini:112,136,160",
    "mini:112:no-mirror",
    "random:A,width=0.25:256,384,512",
    "random:A,width=0.25:256:no-mirror",
    "random:D:256:no-mirror",
    "random:D:256,384,512",
)


def planned(table: Any, folder: Path, settings: list[str], limit: int, repeats: int) -> Rows:
    """Each setting is WEIGHTS:SCALES, and :no-mirror; of the first `limit` images."""
    items = datasets.load("folder", folder).first(limit)
    rows = []
    for setting in settings:
        mirror = not setting.endswith(":no-mirror")
        spec, _, scales = setting.removesuffix(":no-mirror").rpartition(":")
        network = vggfeat.load(spec, device="cpu")
        description = description_of(network, None, tuple(map(int, scales.split(","))), mirror)
        trial, expected, real = [], [], []
        for _ in range(repeats):
            began = time.perf_counter()
            expected.append(
                plan(
                    items, look(items, PLANNED), network, description, "float32", workers=CORES
                ).seconds
            )
            trial.append(time.perf_counter() - began)
            with tempfile.TemporaryDirectory() as temporary:
                out_file = Path(temporary) / "f.h5"
                report = extract(
                    items,
                    network,
                    out_file,
                    scales=description.scales,
                    mirror=mirror,
                    workers=CORES,
                )
            real.append(report.seconds)
        ratios = [a / b for a, b in zip(expected, real, strict=True)]
        row = {
            "what": setting,
            "images": len(items),
            "trial": trial,
            "expected": expected,
            "real": real,
        }
        rows.append(row)
        table.add_row(
            f"{setting}, {len(items)} images",
            *(f"{statistics.median(values):.1f}" for values in (trial, expected, real)),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument(
        "--part", choices=("net", "pipeline", "crop", "dense", "plan"), action="append"
    )
    parser.add_argument(
        "--plan", metavar="WEIGHTS:SCALES", action="append", help="default: six settings"
    )
    parser.add_argument("--scales", default="256,384,512")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--thingsvision", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = sorted(p for p in options.photos.iterdir() if p.is_file())[: options.limit]
    scales = tuple(int(q) for q in options.scales.split(","))
    measured = {}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "vgg16.pth"
        exact = vggfeat.load("random:D", device="cpu", precision="float32")
        torch.save(exact.module.state_dict(), file)
        exact = vggfeat.load(f"torchvision:vgg16@{file}", device="cpu", precision="float32")
        network = vggfeat.load(f"torchvision:vgg16@{file}", device="cpu")
        for part in options.part or ("net", "pipeline", "crop", "dense"):
            headers = {
                "pipeline": ("images/s", "share of the net alone"),
                "plan": ("trial, s", "expected, s", "real, s", "expected / real"),
            }.get(part, ("side", "images/s", "ours is faster by", "least cosine"))
            table = columns(
                "",
                *headers,
                title=f"{part}: {network.precision}, {torch.get_num_threads()} threads",
            )
            if part == "net":
                measured[part] = net_alone(table, network, exact, options.repeats)
            elif part == "pipeline":
                measured[part] = pipeline(table, network, options.photos, scales, options.repeats)
            elif part == "plan":
                measured[part] = planned(
                    table,
                    options.photos,
                    options.plan or list(PLANS),
                    options.limit,
                    options.repeats,
                )
            elif part == "crop":
                measured[part] = crop(
                    table, network, exact, photos, file, options.thingsvision, options.repeats
                )
            else:
                measured[part] = dense(table, network, exact, photos, scales, options.repeats)
            out.print(table)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"precision": network.precision, "threads": torch.get_num_threads(), **measured},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
