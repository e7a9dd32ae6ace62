"""Every command that writes files, on a small input: what `kills` kills, and what `mutations`
changes the files of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from benchmarks.kills import AFTER, HALF, Job, Room

WEIGHTS = "random:B,width=0.0625,crop=32,classes=3"
FAST = ("--device", "cpu", "--precision", "float32")
CLASSES = ["n0", "n1"]
_Make = Callable[["Inputs"], Job]
JOBS: dict[str, _Make] = {}
"""Name -> what makes the command; its inputs are made when they are asked for."""


def picture(seed: int, height: int, width: int, channel: int) -> Image.Image:
    """Noise that is weak in one colour, so that there is something to learn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels[..., channel] //= 4
    return Image.fromarray(pixels)


class Inputs:
    """What the commands read, made once."""

    def __init__(self, room: Room) -> None:
        self.room, self.folder = room, room.folder / "inputs"
        self.folder.mkdir(parents=True)

    def made(self, job: Job, *files: str) -> list[Path]:
        """Outputs of a command that has run well."""
        folder = self.room.fresh(job, f"inputs/made-{job.name}")
        (ended,) = self.room.run(job, folder)
        if ended.status != job.status:
            raise AssertionError(f"{job.name}: {ended}")
        return [folder / name for name in files]

    def _photographs(self, name: str) -> Path:
        root = self.folder / name
        for c, kind in enumerate(("blue", "red")):
            (root / kind).mkdir(parents=True)
            for i in range(6):
                picture(10 * c + i, 40, 40 + 20 * (i % 2), 2 * c).save(root / kind / f"{i}.png")
        return root

    @cached_property
    def images(self) -> Path:
        return self._photographs("images")

    @cached_property
    def spoilt(self) -> Path:
        """The same, and one that can't be read."""
        root = self._photographs("spoilt")
        (root / "red" / "9.png").write_bytes(b"")
        return root

    @cached_property
    def mended(self) -> tuple[Path, Path]:
        """Images of which one couldn't be read when the feature file was made; the file."""
        root = self._photographs("mended")
        (root / "red" / "9.png").write_bytes(b"")
        job = Job("unreadable", vggfeat_main, extract_words(root), status=3)
        (features,) = self.made(job, "f.h5")
        picture(9, 40, 40, 2).save(root / "red" / "9.png")
        return root, features

    @cached_property
    def other_features(self) -> Path:
        job = Job("other", vggfeat_main, [*extract_words(self.images), "--no-mirror"])
        return self.made(job, "f.h5")[0]

    @cached_property
    def begun(self) -> Path:
        """The file of an extraction that was killed in its last write."""
        job = extract(self)
        self.room.run(job, self.room.fresh(job, "inputs/begun"))
        writes = [
            n
            for n, (call, size) in enumerate(self.room.page().calls, 1)
            if "pwrite" in call and size > 1
        ]
        folder = self.room.fresh(job, "inputs/begun")
        self.room.run(job, folder, writes[-1], HALF)
        return folder / "f.h5.partial"

    @cached_property
    def features(self) -> Path:
        return self.made(Job("features", vggfeat_main, extract_words(self.images)), "f.h5")[0]

    @cached_property
    def model(self) -> tuple[Path, Path]:
        """The model and its results."""
        model, results = self.made(
            Job("model", vggfeat_main, svm_words(self.features)), "m.h5", "r.json"
        )
        return model, results

    @cached_property
    def voc(self) -> Path:
        """Descriptors with VOC's protocol."""
        from vggfeat.datasets import Items
        from vggfeat.datasets.voc import CLASSES
        from vggfeat.store import Description
        from vggfeat.writer import FeatureWriter

        count, rng = 60, np.random.default_rng(0)
        labels = np.where(np.arange(count)[:, None] % 20 == np.arange(20), 1, -1).astype(np.int8)
        parts = {name: np.arange(i, count, 3) for i, name in enumerate(("train", "val", "test"))}
        listed = [f"JPEGImages/{i:06d}.jpg" for i in range(count)]
        items = Items("voc2007", "voc2007", Path("/nowhere"), listed, labels, list(CLASSES), parts)
        how = Description(
            "A", "random:A", "ab" * 32, "fc7", (32,), True, "floor", "bilinear", "float32", "Pillow"
        )
        path = self.folder / "voc.h5"
        with FeatureWriter.open(path, items, how, 24) as file:
            for i in range(count):
                file.write(
                    i, 0, (rng.random(24) + np.pad(labels[i] == 1, (0, 4))).astype(np.float32)
                )
            file.finish()
        return path

    @cached_property
    def training(self) -> Path:
        """Training and validation images."""
        root = self.folder / "training"
        for split, count in (("train", 9), ("val", 2)):
            for c, kind in enumerate(CLASSES):
                (root / split / kind).mkdir(parents=True)
                for i in range(count):
                    picture(100 * c + 10 * count + i, 40, 44, 2 * c).save(
                        root / split / kind / f"{i}.png"
                    )
        return root

    @cached_property
    def stopped(self) -> Path:
        """The folder of a training that was killed on its way."""
        job = training(self)
        folder = self.room.fresh(job, "inputs/counted")
        self.room.run(job, folder)
        calls = [call for call, _ in self.room.page().calls]
        saved = [
            n
            for n, call in enumerate(calls, 1)
            if call.startswith("rename") and "last.safetensors" in call
        ]
        folder = self.room.fresh(job, "inputs/stopped")
        self.room.run(job, folder, saved[len(saved) // 2], AFTER)
        return folder / "run"

    @cached_property
    def runs(self) -> Path:
        """Nets as trainings leave them."""
        import vggfeat
        from pretrain.recipe import chain, read_recipe
        from vggfeat.weights import save_weights

        scales = {"A-112": [36, 36], "NET-112": [36, 36], "NET-112-160": [36, 64]}
        others = [
            "width=0.05",
            "crop=32",
            *(f"{stage}.train_scale={S}" for stage, S in scales.items()),
        ]
        for net in ("A", "B"):
            network = vggfeat.load(
                f"random:{net},width=0.05,crop=32,classes=2", device="cpu", precision="float32"
            )
            stage = self.folder / "runs" / net / f"{net}-36"
            stage.mkdir(parents=True)
            save_weights(
                stage / "weights.safetensors",
                network.vgg(),
                network.preprocessing,
                classes=CLASSES,
                train_scale="36",
                source=f"pretrain mini {net}-36",
                recipe=chain(read_recipe("mini", others), net).to_json(),
            )
            (stage / "last.safetensors").write_bytes(b"")
        return self.folder / "runs"


def vggfeat_main() -> None:
    from vggfeat import cli

    cli.main()


def pretrain_main(name: str) -> None:
    from vggfeat.terminal import run

    run(import_module(f"pretrain.{name}").app, f"python -m pretrain.{name}")


def extract_words(root: Path) -> list[object]:
    fixed = [
        "extract",
        "--dataset",
        "folder",
        "--root",
        root,
        "--weights",
        WEIGHTS,
        "--scales",
        "40,48",
    ]
    return [*fixed, "--out", "f.h5", "--json", "f.json", "--workers", 1, *FAST]


def svm_words(features: Path) -> list[object]:
    return [
        "svm",
        "--features",
        features,
        "--out",
        "m.h5",
        "--json",
        "r.json",
        "--workers",
        1,
        "--device",
        "cpu",
    ]


def _job(make: _Make) -> _Make:
    JOBS[make.__name__.strip("_").replace("_", "-")] = make
    return make


@_job
def extract(inputs: Inputs) -> Job:
    return Job("extract", vggfeat_main, extract_words(inputs.images))


@_job
def extract_unreadable(inputs: Inputs) -> Job:
    return Job("extract-unreadable", vggfeat_main, extract_words(inputs.spoilt), status=3)


@_job
def extract_begun(inputs: Inputs) -> Job:
    return Job(
        "extract-begun", vggfeat_main, extract_words(inputs.images), {"f.h5.partial": inputs.begun}
    )


@_job
def extract_retry(inputs: Inputs) -> Job:
    root, features = inputs.mended
    words = [*extract_words(root), "--retry"]
    return Job("extract-retry", vggfeat_main, words, {"f.h5": features})


@_job
def extract_overwrite(inputs: Inputs) -> Job:
    words = [*extract_words(inputs.images), "--overwrite"]
    return Job(
        "extract-overwrite", vggfeat_main, words, {"f.h5": inputs.other_features}, overwrite=False
    )


@_job
def extract_two(inputs: Inputs) -> Job:
    return Job("extract-two", vggfeat_main, extract_words(inputs.spoilt), ranks=2)


@_job
def svm(inputs: Inputs) -> Job:
    return Job("svm", vggfeat_main, svm_words(inputs.features))


@_job
def svm_submission(inputs: Inputs) -> Job:
    words = [*svm_words(inputs.voc), "--submission", "comp2", "--C", "1,10"]
    return Job("svm-submission", vggfeat_main, words)


@_job
def predict(inputs: Inputs) -> Job:
    image = inputs.images / "red" / "0.png"
    words = [
        "predict",
        image,
        "--model",
        inputs.model[0],
        "--out",
        "p.csv",
        "--scores",
        "--device",
        "cpu",
    ]
    return Job("predict", vggfeat_main, [*words, "--workers", 1])


@_job
def report(inputs: Inputs) -> Job:
    words = [
        "report",
        "--features",
        inputs.features,
        "--model",
        inputs.model[0],
        "--results",
        inputs.model[1],
    ]
    return Job("report", vggfeat_main, [*words, "--root", inputs.images, "--out", "page.html"])


@_job
def neighbours(inputs: Inputs) -> Job:
    words = [
        "neighbours",
        "--features",
        inputs.features,
        "--query",
        "red/0.png",
        "--picture",
        "n.png",
    ]
    return Job("neighbours", vggfeat_main, [*words, "--json", "n.json", "--root", inputs.images])


@_job
def explain(inputs: Inputs) -> Job:
    words = ["explain", inputs.images / "red", "--model", inputs.model[0], "--device", "cpu"]
    return Job("explain", vggfeat_main, [*words, "--out", "maps/"])


@_job
def index(inputs: Inputs) -> Job:
    words = ["index", "--features", inputs.features, "--out", "i.h5", "--json", "i.json"]
    return Job("index", vggfeat_main, words)


@_job
def info(inputs: Inputs) -> Job:
    return Job("info", vggfeat_main, ["info", inputs.features, "--json", "i.json"])


@_job
def convert(_: Inputs) -> Job:
    old = Path(__file__).parents[1] / "tests" / "formats" / "version1" / "features.h5"
    return Job("convert", vggfeat_main, ["convert", old, "new.h5"])


def _train_words(inputs: Inputs) -> list[object]:
    numbers = (
        "width=0.05",
        "crop=32",
        "batch_size=8",
        "held_out=0.1",
        "chance_after=0",
        "*.epochs=1.5",
    )
    words = [
        "--net",
        "A",
        "--recipe",
        "mini",
        "--data",
        inputs.training,
        "--out",
        "run",
        "--device",
        "cpu",
    ]
    words += ["--precision", "float32", "--workers", 0, "--micro-batch", 8]
    words += [f"--set={number}" for number in numbers]
    return [*words, "--set=A-112.train_scale=[36,36]", "--checkpoint-minutes", 0, "--log-every", 1]


@_job
def training(inputs: Inputs) -> Job:
    main = partial(pretrain_main, "train")
    return Job("training", main, _train_words(inputs), steps=True, overwrite=False)


@_job
def training_resumed(inputs: Inputs) -> Job:
    return Job(
        "training-resumed",
        partial(pretrain_main, "train"),
        _train_words(inputs),
        {"run": inputs.stopped},
        steps=True,
        overwrite=False,
    )


@_job
def training_two(inputs: Inputs) -> Job:
    main = partial(pretrain_main, "train")
    return Job("training-two", main, _train_words(inputs), ranks=2, steps=True, overwrite=False)


@_job
def training_report(inputs: Inputs) -> Job:
    words = [inputs.stopped, "--out", "page.html"]
    return Job("training-report", partial(pretrain_main, "report"), words)


@_job
def evaluate(inputs: Inputs) -> Job:
    weights = [
        f"--weights={inputs.runs / net / f'{net}-36' / 'weights.safetensors'}" for net in ("A", "B")
    ]
    words = [*weights, "--data", inputs.training, "--scales", "36,40", "--workers", 1, *FAST]
    words = [*words, "--posteriors", "p.h5", "--json", "p.json"]
    return Job("evaluate", partial(pretrain_main, "evaluate"), words)


@_job
def ledger(inputs: Inputs) -> Job:
    text = inputs.folder / "results.md"
    text.write_text("# Results\n\nWhat was there before.\n")
    words = [
        "--table",
        "3",
        "--runs",
        inputs.runs,
        "--data",
        inputs.training,
        "--workers",
        1,
        *FAST,
    ]
    words = [*words, "--ledger", "results.md", "--posteriors", "p.h5"]
    return Job(
        "ledger", partial(pretrain_main, "evaluate"), words, {"results.md": text}, steps=True
    )


@_job
def submission(inputs: Inputs) -> Job:
    synsets = np.array(
        [(i, name, 0) for i, name in enumerate(CLASSES, 1)],
        [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")],
    )
    savemat(inputs.folder / "meta.mat", {"synsets": synsets})
    weights = inputs.runs / "A" / "A-36" / "weights.safetensors"
    words = [
        "--weights",
        weights,
        "--data",
        inputs.training,
        "--scales",
        "36",
        "--workers",
        1,
        *FAST,
    ]
    words = [*words, "--submission", "s.txt", "--devkit", inputs.folder / "meta.mat"]
    return Job("submission", partial(pretrain_main, "evaluate"), words)


@_job
def export(inputs: Inputs) -> Job:
    words = [
        inputs.runs / "A" / "A-36" / "weights.safetensors",
        "--to",
        "float16",
        "--out",
        "a.safetensors",
    ]
    return Job("export", partial(pretrain_main, "export"), words)
