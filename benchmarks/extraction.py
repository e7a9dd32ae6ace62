"""Images per second of extraction with net D, beside its peers on the same photographs, layer and
weights, on a CPU or a GPU.

    python -m benchmarks.extraction --photos DIR [--part net] [--repeats 5] [--thingsvision PYTHON]
    python -m benchmarks.extraction --photos DIR --device cuda --copies 50
    python -m benchmarks.extraction --photos DIR --part plan --plan mini:112,136,160
    python -m benchmarks.extraction --photos DIR --part before --before CHECKOUT [--mirror]

net       the forward pass alone, to fc7, on batches of one shape: ours, OpenVINO in bfloat16 (where
          it is installed; on a CPU), PyTorch's modules in bfloat16, channels-last.
pipeline  from JPEG to feature file, fc7 at each Q of --scales, and at all of them with the mirror
          image: the share of the time that the same batches take alone, and the rate of the first
          time, in which every shape is new, as it is for a user.
crop      the 224 centre crop at Q = 256 to fc7: ours, torchvision's feature extractor and timm's
          vgg16 behind a DataLoader with a process a core, in float32 and under bfloat16 autocast,
          channels-last; thingsvision (--thingsvision: the Python of an environment that has it).
dense     the average map over the whole image at the three scales: ours, and the obvious loop over
          images and scales with torchvision's vgg16 in float32, FC layers turned into convolutions;
          to pool5 and to fc7.
plan      the time that `--dry-run` expects beside the time that the extraction takes, in turns.
fill      images of a forward pass by all headers of the folder, with and without their order: the
          mean, and that of the pass which the median image is in.
before    from JPEG to feature file: this checkout and another, each in processes of its own, in
          turns.

Random weights (speed doesn't depend on them), the same on each side, in a file of torchvision's
layout. Sides take turns; medians; least cosine of the outputs to float32's, which must be 0.999.
Each rate also as a share of the rate of a large matrix product on the same device in the same run.
The folder is one of photographs, or of class folders.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import vggfeat
from vggfeat import datasets
from vggfeat.batches import CROP_PIXELS, Buckets, by_shape, gathered
from vggfeat.decode import expected_shape, read_rgb
from vggfeat.describe import describe, describe_all, description_of
from vggfeat.devices import matrix_rate, resolve_device
from vggfeat.extract import extract
from vggfeat.images import (
    centre_crop,
    grid_crops,
    smallest_side,
    smallest_side_shape,
)
from vggfeat.look import look
from vggfeat.machine import CORES
from vggfeat.plan import PLANNED, forward_flop, plan
from vggfeat.terminal import columns, err, out
from vggfeat.weights import Network

Sides = dict[str, Callable[[], np.ndarray]]
Rows = list[dict[str, Any]]
SHAPES = {
    "cpu": ((8, 224, 224), (4, 256, 341), (1, 512, 683)),
    "cuda": ((128, 224, 224), (64, 256, 341), (36, 384, 512), (18, 512, 683)),
}
LEAST_COSINE = 0.999
PASSES = {"cpu": 1, "cuda": 10}
"""Forward passes that are timed together; one alone would be too short."""
PEER_BATCH = {"cpu": 8, "cuda": 64}


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
    network: Network,
    flop: float,
) -> Rows:
    """A line a side: images/s, ours as a multiple of it, share of the matrix rate, least cosine to
    the output `like`. flop: of all images together.
    """
    rows = []
    for name, value in seconds.items():
        cosine = least_cosine(outputs[name], outputs[like])
        if cosine < LEAST_COSINE:
            raise SystemExit(
                f"{what}: the output of {name} differs from {like}'s: least cosine {cosine:.5f}"
            )
        rate, ratio = images / value, value / seconds["ours"]
        share = flop / value / matrix_rate(network.device, network.precision)
        row = {"what": what, "side": name, "images_per_s": rate, "ratio": ratio, "cosine": cosine}
        rows.append(row | {"share": share})
        if name != like or name != "ours":
            words = f"{rate:.2f}", f"{ratio:.2f}", f"{100 * share:.0f} %", f"{cosine:.6f}"
            table.add_row(what, name, *words)
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
    whole = torch.nn.Sequential(*module.features, *fcs).eval()
    whole = whole.to(network.device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(x_NCHW: torch.Tensor, until: str) -> torch.Tensor:
        y: torch.Tensor = (whole if until == "fc7" else whole[:31])(x_NCHW.to(precision))
        return y.mean((2, 3), dtype=torch.float32)

    return run


def net_alone(table: Any, network: Network, exact: Network, repeats: int) -> Rows:
    rows = []
    modules = plain(exact, torch.bfloat16)
    reference = plain(exact, torch.float32)
    device = network.device
    for n, h, w in SHAPES[device.type]:
        images = torch.randint(
            0, 256, (n, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ).to(device)

        def several(run: Callable[[], torch.Tensor]) -> np.ndarray:
            """The last of some passes, which are all queued before the first is asked for."""
            for _ in range(PASSES[device.type]):
                made = run()
            return made.cpu().numpy()

        # each from the pixels
        def of_modules(images: torch.Tensor = images) -> torch.Tensor:
            return modules(exact.preprocessing(images), "fc7")

        sides: Sides = {
            "ours": partial(several, partial(describe, network, images, "fc7", False)),
            "modules": partial(several, of_modules),
        }
        if device.type == "cpu":
            try:
                sides["OpenVINO"] = openvino(exact, exact.preprocessing(images))
            except ImportError:
                err.print("OpenVINO is not installed: left out")
        seconds, outputs = in_turns(sides, repeats)
        outputs["float32"] = np.concatenate(
            [reference(exact.preprocessing(each), "fc7").cpu().numpy() for each in images.split(4)]
        )
        seconds = {name: value / PASSES[device.type] for name, value in seconds.items()}
        flop = n * forward_flop(network, "fc7", h, w)
        what = f"{n} x {h}x{w}"
        rows += report(table, what, n, seconds, outputs, "float32", network, flop)
    return rows


def work_of(
    network: Network, layer: str, sources: Iterable[Any], scales: tuple[int, ...], mirror: bool
) -> float:
    """Operations of all forward passes of these images."""
    counted = Counter(expected_shape(source) for source in sources)
    views = 2 if mirror else 1
    return views * sum(
        times * forward_flop(network, layer, *smallest_side_shape(*sides, q))
        for sides, times in counted.items()
        if sides
        for q in scales
    )


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
    """Whole extractions, and each time their batches again, from the device's memory."""
    items = datasets.load("folder", folder)
    rows = []
    for chosen, mirror in (*(((q,), False) for q in scales), (scales, True)):
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
                out_file = Path(temporary) / "f.h5"
                made = extract(
                    items, network, out_file, scales=chosen, mirror=mirror, workers=CORES
                )
            began = time.perf_counter()
            for images_NHWC in batches:
                last = describe(network, images_NHWC, "fc7", mirror)
            last.cpu()
            alone = time.perf_counter() - began
            if turn:
                shares.append(alone / made.run_seconds)
                rates.append(made.rate)
            else:
                cold = made.rate
        rate, share = statistics.median(rates), statistics.median(shares)
        flop = work_of(network, "fc7", map(items.source, range(len(items))), chosen, mirror)
        of_matrix = flop * rate / len(items) / matrix_rate(network.device, network.precision)
        what = f"Q={','.join(map(str, chosen))}{', mirror' if mirror else ''}"
        row = {"what": what, "images_per_s": rate, "share_of_net": share, "share": of_matrix}
        rows.append(row | {"cold": cold})
        words = f"{rate:.2f}", f"{cold:.2f}", f"{100 * share:.0f} %", f"{100 * of_matrix:.0f} %"
        table.add_row(f"{what}, {len(items)} images", *words)
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

    device, state = network.device, exact.module.state_dict()
    vgg16 = torchvision.models.vgg16(weights=None).eval()
    vgg16.load_state_dict(state)
    extractor = create_feature_extractor(vgg16, {"classifier.4": "fc7"}).to(device)
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
    backbone = backbone.to(device)

    def loaded(
        model: torch.nn.Module, feature: Callable[[Any], torch.Tensor], low: bool
    ) -> np.ndarray:
        layout = torch.channels_last if low else torch.contiguous_format
        model = model.to(memory_format=layout)
        loader = DataLoader(
            Crops(photos, exact),
            batch_size=PEER_BATCH[device.type],
            num_workers=CORES,
            pin_memory=device.type == "cuda",
        )
        made = []
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            for x in loader:
                x = x.to(device, non_blocking=True, memory_format=layout)
                made.append(feature(model(x)).float())
        return torch.cat(made).cpu().numpy()

    def ours() -> np.ndarray:
        """Photographs are rescaled where they are described, and cut there."""
        got = {
            i: value
            for i, _, value in by_shape(
                lambda i: read_rgb(photos[i]),
                lambda i: expected_shape(photos[i]),
                range(len(photos)),
                (256,),
                lambda x: describe(network, grid_crops(x, 224, n=1)[0], "fc7", False),
                device,
                workers=CORES,
            )
        }
        return np.stack([np.asarray(got[i]) for i in range(len(photos))])

    def peers(low: bool) -> Sides:
        words = "bfloat16 autocast" if low else "float32"
        return {
            f"torchvision, {words}": partial(loaded, extractor, itemgetter("fc7"), low),
            f"timm, {words}": partial(loaded, backbone, lambda y: y, low),
        }

    seconds, outputs = in_turns({"ours": ours, **peers(False), **peers(True)}, repeats)
    flop = len(photos) * forward_flop(network, "fc7", 224, 224)
    exactly = "torchvision, float32"
    rows = report(table, "224 crop", len(photos), seconds, outputs, exactly, network, flop)
    if python:
        # its own resize and crop round otherwise than ours: its outputs are held against
        # torchvision's after those
        transform = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
        with torch.inference_mode():
            crops = [transform(Image.open(photo).convert("RGB"))[None] for photo in photos]
            own = torch.cat([extractor(x.to(device))["fc7"].cpu() for x in crops]).numpy()
        taken, found = thingsvision(python, photos, file, repeats)
        outputs = {"ours": own, "thingsvision": found}
        both = {"ours": seconds["ours"], "thingsvision": taken}
        rows += report(table, "224 crop", len(photos), both, outputs, "ours", network, flop)[1:]
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
    run, device = plain(exact, torch.float32), network.device
    rows = []
    for layer in ("pool5", "fc7"):
        description = description_of(network, layer, scales, mirror=False)

        def ours(description: Any = description) -> np.ndarray:
            got = dict(describe_all(network, photos, description, workers=CORES))
            return np.stack([np.asarray(got[i]) for i in range(len(photos))])

        def loop(layer: str = layer) -> np.ndarray:
            described = []
            for photo in photos:
                image = read_rgb(photo)
                small = [torch.from_numpy(smallest_side(image, q))[None] for q in scales]
                described.append(
                    [run(exact.preprocessing(x.to(device)), layer)[0].cpu().numpy() for x in small]
                )
            return np.asarray(described)

        seconds, outputs = in_turns({"ours": ours, "loop": loop}, repeats)
        what = f"{layer}, Q={','.join(map(str, scales))}"
        flop = work_of(network, layer, photos, scales, mirror=False)
        rows += report(table, what, len(photos), seconds, outputs, "loop", network, flop)
    return rows


EXTRACTION = """
import sys, tempfile
from pathlib import Path
try:
    from vggfeat.start import settle
except ImportError:
    from vggfeat.devices import keep_memory as settle
settle()
import numpy, vggfeat
from vggfeat import datasets
from vggfeat.extract import extract
from vggfeat.machine import CORES
folder, weights, device, scales, mirror, limit = sys.argv[1:]
scales, mirror = tuple(map(int, scales.split(","))), mirror == "True"
network = vggfeat.load("torchvision:vgg16@" + weights, device=device)
items = datasets.load("folder", Path(folder))
items = items.take(numpy.linspace(0, len(items) - 1, min(int(limit), len(items))).astype(int))
with tempfile.TemporaryDirectory() as temporary:
    out = Path(temporary) / "f.h5"
    for _ in sys.stdin:
        how = dict(scales=scales, mirror=mirror, workers=CORES, overwrite=True)
        made = extract(items, network, out, **how)
        print(made.rate, flush=True)
    numpy.save(sys.stdout.buffer, vggfeat.open_features(out).descriptors[:])
"""


def beside(
    table: Any,
    network: Network,
    folder: Path,
    file: Path,
    scales: tuple[int, ...],
    mirror: bool,
    limit: int,
    checkout: Path,
    repeats: int,
) -> Rows:
    """At the first of the scales, and at all of them: this checkout and another one in turns."""
    own = Path(__file__).parents[1]
    rows = []
    for chosen in dict.fromkeys((scales[:1], scales)):
        words = [folder.resolve(), file, network.device, ",".join(map(str, chosen)), mirror, limit]
        running = {
            side: subprocess.Popen(
                [sys.executable, "-c", EXTRACTION, *map(str, words)],
                cwd=tempfile.gettempdir(),
                env=os.environ | {"PYTHONPATH": str(place.resolve())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for side, place in {"now": own, "before": checkout}.items()
        }
        rates: dict[str, list[float]] = {side: [] for side in running}
        for turn in range(repeats + 1):
            for side, process in running.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
                rate = float(process.stdout.readline())
                if turn:
                    rates[side].append(rate)
        outputs = {
            side: np.load(io.BytesIO(process.communicate()[0])) for side, process in running.items()
        }
        ratios = [now / before for now, before in zip(*rates.values(), strict=True)]
        what = f"Q={','.join(map(str, chosen))}{', mirror' if mirror else ''}"
        cosine = least_cosine(outputs["now"], outputs["before"])
        row = {"what": what, "images_per_s": rates, "ratios": ratios, "cosine": cosine}
        rows.append(row)
        table.add_row(
            what,
            *(f"{statistics.median(values):.2f}" for values in rates.values()),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{cosine:.6f}",
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


def fill(table: Any, folder: Path, scales: tuple[int, ...]) -> Rows:
    """By the rule that extraction goes by, `batches.Buckets`; without order, images come by name,
    and a bucket is closed when it's full, too many wait, or none comes any more.
    """
    items = datasets.load("folder", folder)
    shapes = look(items, len(items)).shapes
    rows = []
    for batch_size in (8, 32, 64, 128):
        most = batch_size * CROP_PIXELS
        as_they_come = Buckets[int](scales)
        batches = [
            batch
            for i, sides in shapes.items()
            for s, q in enumerate(scales)
            if (batch := as_they_come.put((s, *smallest_side_shape(*sides, q)), i, most))
        ]
        ways = {
            "as they come": [*batches, *as_they_come.rest()],
            "in order of shape": list(gathered(shapes, scales, most)),
        }
        for s, q in enumerate(scales):
            row: dict[str, Any] = {"batch": batch_size, "Q": q}
            for way, found in ways.items():
                sizes = [len(members) for shape, members in found if shape[0] == s]
                of_image = sorted(n for n in sizes for _ in range(n))
                row[way] = statistics.mean(sizes), statistics.median(of_image), len(sizes)
            rows.append(row)
            words = (f"{mean:.2f}, {median:.0f}" for mean, median, _ in (row[way] for way in ways))
            table.add_row(f"batch {batch_size}, Q={q}", *words)
    return rows


HEADERS = {
    "fill": ("as they come", "in order of shape"),
    "pipeline": ("images/s", "the first time", "share of the net alone", "of the matrix rate"),
    "plan": ("trial, s", "expected, s", "real, s", "expected / real"),
    "before": ("now, images/s", "before", "now / before", "least cosine"),
}
SIDES = "side", "images/s", "ours is faster by", "of the matrix rate", "least cosine"


@contextmanager
def copied(folder: Path, copies: int) -> Iterator[Path]:
    """The folder, or one in which each of its photographs is so many times."""
    if copies == 1:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.rglob("*"):
            if path.is_file():
                for copy in range(copies):
                    link = Path(temporary) / path.relative_to(folder).parent / f"{copy}-{path.name}"
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
        yield Path(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parts = ("net", "pipeline", "crop", "dense", "plan", "fill", "before")
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copies", type=int, default=1, help="of each photograph")
    parser.add_argument(
        "--plan", metavar="WEIGHTS:SCALES", action="append", help="default: six settings"
    )
    parser.add_argument("--scales", default="256,384,512")
    parser.add_argument("--mirror", action="store_true", help="in the part `before`")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another version of this")
    parser.add_argument("--limit", type=int, default=1 << 20, help="photographs, of all copies")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--thingsvision", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scales = tuple(int(q) for q in options.scales.split(","))
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as temporary, copied(options.photos, options.copies) as root:
        photos = sorted(p for p in root.rglob("*") if p.is_file())[: options.limit]
        file = Path(temporary) / "vgg16.pth"
        exact = vggfeat.load("random:D", device=device, precision="float32")
        torch.save(exact.module.state_dict(), file)
        exact = vggfeat.load(f"torchvision:vgg16@{file}", device=device, precision="float32")
        network = vggfeat.load(f"torchvision:vgg16@{file}", device=device)
        rate = matrix_rate(device, network.precision)
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        out.print(
            f"{what}, {network.precision}, {torch.get_num_threads()} threads: a matrix product runs"
            f" at {rate / 1e12:.3g} TFLOP/s"
        )
        measured = {}
        for part in options.part or ("net", "pipeline", "crop", "dense"):
            table = columns("", *HEADERS.get(part, SIDES), title=part)
            if part == "net":
                measured[part] = net_alone(table, network, exact, options.repeats)
            elif part == "pipeline":
                measured[part] = pipeline(table, network, root, scales, options.repeats)
            elif part == "fill":
                measured[part] = fill(table, root, scales)
            elif part == "plan":
                settings = options.plan or list(PLANS)
                measured[part] = planned(table, root, settings, options.limit, options.repeats)
            elif part == "before":
                measured[part] = beside(
                    table,
                    network,
                    root,
                    file,
                    scales,
                    options.mirror,
                    options.limit,
                    options.before or parser.error("--part before needs --before CHECKOUT"),
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
        facts = {"device": what, "precision": network.precision, "matrix_rate": rate}
        facts["threads"] = torch.get_num_threads()
        options.json.write_text(json.dumps(facts | measured, indent=1))


if __name__ == "__main__":
    main()
