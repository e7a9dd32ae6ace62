"""Every command in the README and docs/ runs, on small stand-ins for the data sets and the released
weights.

Done in this process, one document after another, each in a folder of its own where its commands
follow one another; a document's Python comes after them. torchrun's part of a line is left out
(other tests start processes). Benchmarks, which take minutes, are parsed and not run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from scipy.io import savemat

import pretrain.recipe
from pretrain import evaluate, localise, train
from pretrain.init import FROM_A
from pretrain.posteriors import GRID
from vggfeat import cli, metrics, sources, weights
from vggfeat.aggregate import POOLINGS
from vggfeat.datasets import describe_datasets
from vggfeat.datasets.splits import N_SPLITS, VAL_FRACTION
from vggfeat.datasets.voc import CLASSES
from vggfeat.datasets.voc_action import ACTIONS
from vggfeat.decode import MAX_PIXELS
from vggfeat.images import MAX_RESCALED_PIXELS
from vggfeat.protocols import C_STEP, MAX_EXTENSIONS
from vggfeat.svm import C_GRID, LinearSVM
from vggfeat.table1 import NETS, parameter_count
from vggfeat.terminal import run
from vggfeat.vgg import VGG

from .conftest import SLOW, TESTS, Command, photograph, vgg_of
from .vggfeat.datasets.made import Persons, annotation, make_action

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WNIDS = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916"]
WAYS_IN = ("vggfeat ", "python -m pretrain.", "python -m benchmarks.", "torchrun ")
# What `make` and pip do is what a checkout is tested with.
ELSEWHERE = re.compile(
    r"make (demo|test|mini)|pip install|source \.venv"
    r"|(KILLS|HANGS|TERMS|LONG)=\d+ (python -m )?pytest"
)


def commands(document: Path) -> list[str]:
    """The commands of a document's code blocks and of its text, in their order, without
    comments.
    """
    # a record of what was run
    text = re.sub(r"<!-- ledger: .*?<!-- end of ledger", "", document.read_text(), flags=re.S)
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
        lines = iter(re.sub(r" *(#.*)?\\\n\s+", " ", block).splitlines())
        for line in lines:
            line = re.sub(r"\s{2,}#.*", "", line.removeprefix("$ ")).strip()
            if line.startswith('python -c "'):
                while line.count('"') % 2:
                    line += "\n" + next(lines)
                found.append(line)
            elif line.startswith(WAYS_IN):
                found.append(line)
    return found


def test_every_code_block_with_a_prompt_is_known() -> None:
    """A line that looks like a command is one that is run here, or by `make`."""
    for document in DOCUMENTS:
        known = commands(document)
        for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.S | re.M):
            for line in block.splitlines():
                if line.startswith("$ ") or re.match(
                    r"(python|make|pip|source|[A-Z]+=\S+ \w)", line
                ):
                    line = re.sub(r"\s{2,}#.*", "", line.removeprefix("$ ")).rstrip(" \\")
                    there = any(command.startswith(line) for command in known) or "ledger" in line
                    assert there or ELSEWHERE.match(line) or "build/tables" in line, (
                        f"{document.name}: {line}"
                    )


def test_every_promise_names_a_test_that_there_is() -> None:
    """`FILE -k WORDS`, where each word selects some test of that file."""
    named = re.findall(
        r"`((?:\w+/)*test_\w+\.py)(?: -k ([^`]+))?`",
        (ROOT / "docs/reliability.md").read_text(),
    )
    assert len(named) > 20
    for file, words in named:
        names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
        for word in words.strip('"').split(" or ") if words else [""]:
            assert any(word in name for name in names), f"{file} -k {word}"


def test_every_module_has_a_line() -> None:
    """A data set's own file is told by its data set (docs/datasets.md)."""
    told = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("vggfeat/*.py"), *ROOT.glob("pretrain/*.py")]
    assert not [path.name for path in files if path.name[0] != "_" and f"`{path.name}`" not in told]


def test_every_slow_test_is_one_that_there_is() -> None:
    """And no other: a name that several files have stands there with its file."""
    means: dict[str, list[str]] = {line: [] for line in SLOW}
    for path in TESTS.rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M):
            test = f"{path.relative_to(TESTS)}::{name}"
            for line in SLOW & {name, test}:
                means[line].append(test)
    assert not {line: tests for line, tests in means.items() if len(tests) != 1}


PAPER = (ROOT / "docs/paper.md").read_text()


def test_the_paper_page_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`((?:\w+/)*test_\w+\.py)::(\w+)`", PAPER))
    assert len(named) > 50
    for file, name in sorted(named):
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def default_of(name: str) -> Any:
    """Of `COMMAND --option`; or of a key of the recipe `paper`, `KEY` or `STAGE.KEY`, for net D."""
    command, _, option = name.partition(" ")
    if option:
        apps = {"train": train.app, "evaluate": evaluate.app, "localise": localise.app}
        app = apps.get(command, cli.app)
        parser = typer.main.get_command(app)
        parser = getattr(parser, "commands", {}).get(command, parser)
        (found,) = (p for p in parser.params if option in p.opts)
        return found.default
    recipe = pretrain.recipe.chain(pretrain.recipe.read_recipe("paper"), "D", task="localisation")
    stage, _, key = name.rpartition(".")
    records: dict[str, Any] = {"": recipe, **{part.name: part for part in recipe.stages}}
    return getattr(records[stage], key)


def test_the_paper_page_has_the_codes_defaults() -> None:
    stated = re.findall(r"`([\w.-]+(?: --[\w-]+)?)` \(([^()]*)\)", PAPER)
    assert len(stated) > 50
    for name, text in stated:
        default = default_of(name)
        written = default if isinstance(default, str) else json.dumps(default, default=str)
        assert text == (written if default not in (None, "") else "none"), name
    recipe = pretrain.recipe.read_recipe("paper")
    for number in fields(recipe):  # each has its place
        assert f"`{number.name}`" in PAPER or not isinstance(
            getattr(recipe, number.name), int | float
        ), number


def test_the_paper_page_has_the_codes_constants() -> None:
    low, high = (round(math.log2(C)) for C in (C_GRID[0], C_GRID[-1]))
    millions = [
        f"{parameter_count(net, 1000, 1.0, 224) / 1e6:.0f}" for net in ("A", "B", "C", "D", "E")
    ]
    for sentence in (
        (
            f"{len(C_GRID)} values from 2^{low} to 2^{high} by factors of {C_STEP:g}, up to"
            f" {MAX_EXTENSIONS} more"
        ),
        f"{', '.join(millions[:-1])} and {millions[-1]} million parameters",
        f"{GRID}x{GRID} grid, 2 flips: {2 * GRID**2} a scale, {6 * GRID**2} over three",
        f"{VAL_FRACTION:.0%}".replace("%", " % of train chooses"),
        f"{N_SPLITS} random splits",
        f"a duality gap of {LinearSVM().tol:.0e}".replace("e-0", "e-"),
        (
            f"over {MAX_PIXELS:,} pixels, or over {MAX_RESCALED_PIXELS // 10**6} million after"
            " rescaling"
        ),
        f"which four: {', '.join(FROM_A[:-3])}, by stage",
    ):
        assert sentence in PAPER, sentence


FORMATS_PAGE = (ROOT / "docs/formats.md").read_text()


def listed(key: str, section: str) -> str:
    """What the formats' page says of a key, in the last cell of its row."""
    rows = FORMATS_PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    (row,) = (row for row in rows if row.startswith(f"| `{key}` |"))
    return row.rstrip(" |").rpartition(" | ")[2]


def test_the_formats_page_lists_what_the_code_has() -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"`([^`]+)`", text)

    compared = [key for key in metrics.FIGURES if key != "map_every_class"]  # for information
    assert words(listed("compared_by", "results.json")) == compared
    assert words(listed("selected_by", "results.json")) == ["compared_by"]
    pools = listed("facts", "The model file").partition("over the scales: ")[2].partition(" (")[0]
    assert words(pools) == [*POOLINGS]
    assert re.split(", | or ", listed("net", "The weights file")) == [*NETS]


def test_every_data_set_and_source_has_a_line() -> None:
    def firsts(document: str) -> list[str]:
        """The first cells of the page's first table."""
        lines = (ROOT / "docs" / document).read_text().partition("|---")[2].splitlines()[1:]
        table = itertools.takewhile(lambda line: line.startswith("|"), lines)
        return [line.split("|")[1].strip() for line in table]

    assert firsts("datasets.md") == [f"`{name}`" for name, _, _ in describe_datasets()]
    rows = " ".join(firsts("weights.md"))
    assert [name for name in sources.SOURCES if f"`{name}" not in rows] == []


def write_images(folder: Path, names: list[str], side: int = 40) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(i, side, side + i % 3 * 8)).save(path)


def write_voc(folder: Path, parts: dict[str, range], unlabelled: tuple[str, ...] = ()) -> None:
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for part, ids in parts.items():
        write_images(folder / "JPEGImages", [f"{i:06d}.jpg" for i in ids])
        (lists / f"{part}.txt").write_text("".join(f"{i:06d}\n" for i in ids))
        for k, name in enumerate(CLASSES) if part not in unlabelled else ():
            lines = [f"{i:06d} {1 if (i + k) % 3 == 0 else -1:2d}\n" for i in ids]
            (lists / f"{name}_{part}.txt").write_text("".join(lines))


def stand_in(source: str, what: str, file: Path | None) -> weights.Network:
    """In place of the released D and E: a narrow net of random weights, with their names, classes
    and S.
    """
    network = sources.load(f"random:{what},width=0.015625,crop=32,classes={len(WNIDS)}")
    network.classes = WNIDS
    network.spec = f"{source}:{what}"
    network.metadata |= {"train_scale": "256-512", "source": sources.OXFORD[what]}
    return network


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all data that the documents speak of; it is the working directory."""
    write_voc(
        tmp_path / "data/VOCdevkit/VOC2007",
        {"train": range(3), "val": range(3, 6), "test": range(6, 9)},
    )
    write_voc(
        tmp_path / "data/VOCdevkit/VOC2012",
        {"train": range(3), "val": range(3, 6), "test": range(6, 8)},
        unlabelled=("test",),
    )
    devkit = tmp_path / "data/VOCdevkit/VOC2012"
    persons: dict[str, Persons] = {
        part: {(f"{i:06d}", n): (ACTIONS[(i + n) % 3],) for i in ids for n in (1, 2)}
        for part, ids in (("train", range(3)), ("val", range(3, 6)), ("test", range(6, 8)))
    }
    make_action(devkit, persons, ("train", "val"))
    (devkit / "Annotations").mkdir()
    for i in range(8):
        with Image.open(devkit / "JPEGImages" / f"{i:06d}.jpg") as picture:
            size = picture.size
        text = annotation((0, 0, 20, 40), (20, 0, 40, 40), size=size, name="person")
        (devkit / "Annotations" / f"{i:06d}.xml").write_text(text)
    for name in (
        "data/101_ObjectCategories",
        "DIR/101_ObjectCategories",
        "HALF/101_ObjectCategories",
    ):
        write_images(
            tmp_path / name, [f"{c}/image_{i:04d}.jpg" for c in ("ant", "bee") for i in range(8)]
        )
    for name in ("imagenet", "imagenette144"):
        write_images(tmp_path / name, [f"train/{w}/{i}.jpg" for w in WNIDS for i in range(5)])
        write_images(tmp_path / name, [f"val/{w}/{i}.jpg" for w in WNIDS for i in range(1)])
    write_images(tmp_path / "imagenet", [f"test/ILSVRC2012_test_{i:08d}.JPEG" for i in range(3)])
    (tmp_path / "data/train").symlink_to(tmp_path / "imagenet/train")
    (tmp_path / "data/val").symlink_to(tmp_path / "imagenet/val")
    synsets = [(i + 1, name, 0) for i, name in enumerate(WNIDS)]
    record = np.array(
        synsets, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    )
    (tmp_path / "ILSVRC2012_devkit_t12/data").mkdir(parents=True)
    savemat(tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat", {"synsets": record})
    write_images(
        tmp_path / "photos", [f"{c}/{i}.jpg" for c in ("cat", "dog", "flower") for i in range(8)]
    )
    write_images(
        tmp_path / "flowers", [f"{c}/{i}.jpg" for c in ("daisy", "roses") for i in range(8)]
    )
    (tmp_path / "photos/flower/broken.jpg").write_bytes(b"no image at all")
    write_images(tmp_path / "flat", ["1.jpg", "2.jpg"])
    write_images(tmp_path, ["new1.jpg", "new2.jpg"])
    rows = [
        f"photos/{c}/{i}.jpg,{c},{'train' if i < 6 else 'test'}"
        for c in ("cat", "dog")
        for i in range(8)
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    write_bucket(tmp_path / "bucket")
    for name in ("docs", "build/demo"):
        (tmp_path / name).mkdir(parents=True)
    net = stand_in("oxford", "D", None)
    convolutions = VGG("D", width=0.015625, crop=32, until="pool5")
    convolutions.load_state_dict(net.module.state_dict(), strict=False)
    weights.save_weights(tmp_path / "vgg16_conv_caffe.safetensors", convolutions, net.preprocessing)

    weights.save_weights(tmp_path / "d.safetensors", vgg_of(net), net.preprocessing, classes=WNIDS)
    for S, boxes in (("256", "scr"), ("384", "pcr")):
        module = VGG("D", weights.outputs(boxes, len(WNIDS)), width=0.015625, crop=32)
        weights.save_weights(
            tmp_path / f"loc{S}.safetensors",
            module,
            net.preprocessing,
            classes=WNIDS,
            train_scale=S,
            boxes=boxes,
            box_unit=1.0,
        )
    rows = [f"train/{w}/{i}.jpg,{w},5,5,30,35" for w in WNIDS for i in range(5)]
    rows += [f"val/{w}/0.jpg,{w},5,5,30,35" for w in WNIDS]
    (tmp_path / "boxes").write_text("\n".join(["path,class,x1,y1,x2,y2", *rows]) + "\n")

    recipes = tmp_path / "recipes"
    shutil.copytree(pretrain.recipe.RECIPES, recipes)
    small = {
        "width": "0.015625",
        "crop": "32",
        "batch_size": "8",
        "held_out": "0.1",
        "chance_after": "0",
    }
    for path in recipes.glob("*.toml"):
        text = re.sub(r"^(iterations|epochs) = \S+", "iterations = 2", path.read_text(), flags=re.M)
        if path.stem == "paper":  # at crops of 224 its S are the paper's by themselves
            its = "".join(f'{S} = "{S}"\n' for S in ("256", "384", "256-512"))
            text = text.replace("[[stages]]", f"[stands_for]\n{its}\n[[stages]]", 1)
        for key, value in small.items():
            text = re.sub(rf"^{key} = \S+", f"{key} = {value}", text, flags=re.M)
        path.write_text(text)
    monkeypatch.setattr(pretrain.recipe, "RECIPES", recipes)
    # what the words tell of the real one is not true of it
    stood_in = replace(sources.SOURCES["oxford"], load=stand_in, told=None)
    monkeypatch.setitem(sources.SOURCES, "oxford", stood_in)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class ParsedError(Exception):
    """A benchmark's options are right."""


def parsed_only(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *given: Any) -> None:
        real(self, *given)
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", words)
        with pytest.raises(ParsedError):
            importlib.import_module(words[0]).main()


def clear(words: list[str]) -> None:
    """What a command would find from one before it that stands for another user's."""
    goes_on = {"--stages", "--from", "--task", "--dry-run"}  # with what there is
    if words[0] == "pretrain.train" and not goes_on & set(words):
        net = words[words.index("--net") + 1]
        shutil.rmtree(
            words[words.index("--out") + 1] if "--out" in words else f"runs/{net}",
            ignore_errors=True,
        )
        return
    outputs = [
        words[i + 1]
        for i, word in enumerate(words)
        if word in ("--out", "--submission")
        or (word == "--posteriors" and words[0] == "pretrain.evaluate")
    ]
    for name in [
        *outputs,
        "feats.h5" if words[:2] == ["vggfeat", "extract"] and "--out" not in words else "",
    ]:
        if name and Path(name).is_file():
            Path(name).unlink()


def elsewhere(line: str, here: Path) -> str:
    """A command with the places of here for those that it speaks of."""
    places = {
        "/imagenet": "imagenet",
        "HOST:": "localhost:",
        "s3://bucket": f"file://{here}/bucket",
        "hf://datasets/OWNER/NAME": f"file://{here}/bucket",
        "{0000..0127}": "{0000..0001}",
    }
    for there, its in places.items():
        line = line.replace(there, its)
    return line


def is_set(words: list[str]) -> bool:
    """Whether an extraction's --out is of a set of shards."""
    name = words[words.index("--out") + 1] if "--out" in words else ""
    return name.endswith("/") or "://" in name


def write_bucket(folder: Path) -> None:
    """Photographs one by one, in tars and in Parquet files."""
    names = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(4)]
    write_images(folder / "photos", names)
    (folder / "data").mkdir()
    for part in range(2):
        with tarfile.open(folder / f"train-{part:04d}.tar", "w") as tar:
            for i, name in enumerate(names[part::2]):
                tar.add(folder / "photos" / name, f"{i}.jpg")
        images = [(folder / "photos" / name).read_bytes() for name in names[part::2]]
        table = pa.table(
            {"image": images, "label": [name.split("/")[0] for name in names[part::2]]}
        )
        pq.write_table(table, folder / "data" / f"train-{part}.parquet")


def main_of(words: list[str]) -> Callable[[], None]:
    if words[0] == "vggfeat":
        return cli.main
    return functools.partial(run, importlib.import_module(words[0]).app, f"python -m {words[0]}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_runs(
    document: Path, here: Path, run_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = commands(document)
    if any("--dataset photographs" in line for line in found):
        pytest.importorskip("skimage")
    for needed in ("c384.h5", "c512.h5"):
        if any(needed in line for line in found):
            scale = needed.removeprefix("c").removesuffix(".h5")
            given = (
                "--dataset caltech101 --root DIR --weights vgg16_conv_caffe.safetensors --layer"
                " pool5 --no-mirror"
            )
            ran = run_main(cli.main, "extract", *given.split(), "--scales", scale, "--out", needed)
            assert ran.status == 0, ran.err
    if document.name == "evaluation.md":  # it goes on where training.md ends
        train = functools.partial(run_main, main_of(["pretrain.train"]), "--workers", "0")
        assert train("--net", "D", "--data", "imagenet").status == 0
    if any("voc2012.h5" in line for line in found):
        ran = run_main(
            cli.main, "extract", "--dataset", "voc2012", "--scales", "64", "--out", "voc2012.h5"
        )
        assert ran.status == 0, ran.err
    for line in found:
        if line.startswith("python -c"):
            subprocess.run([sys.executable, "-c", shlex.split(line)[2]], check=True)
            continue
        words = shlex.split(elsewhere(line, here))
        words = (
            words[words.index("vggfeat") :]
            if "vggfeat" in words
            else words[words.index("-m") + 1 :]
        )
        if words[0].startswith("benchmarks."):
            parsed_only(monkeypatch, words)
            continue
        clear(words)
        more = ["--workers", "0"] if words[0] == "pretrain.train" else []
        if words[0] == "pretrain.reproduce":  # each kind of table has its tests
            more += ["--workers", "0", "--seeds", "0"]
            more += [] if "--only" in words else ["--only", "table 5"]
        if words[:2] == ["vggfeat", "extract"] and is_set(words) and "--weights" not in words:
            more += ["--weights", "d.safetensors"]  # other processes read it
        more += ["--limit", "100"] if "digits" in words else []
        ran = run_main(main_of(words), *words[1:], *more)
        damaged = ran.status == 3 and "unreadable: " in ran.err
        # a stand-in's width; `pretrain/test_export.py` has the real one
        narrow = "torchvision and timm have this net at width 1 and crop 224 only" in ran.err
        assert ran.status == 0 or damaged or narrow, f"{document.name}: {line}\n{ran.err[-2000:]}"
    if document.name == "formats.md":  # what it reads, any feature file
        ran = run_main(
            cli.main, "extract", "--dataset", "folder", "--root", "photos", "--scales", "64,96"
        )
        assert ran.status == 3, ran.err
    photo = Image.open("new1.jpg")
    photo.save("a.jpg")
    names = {"pil_image": photo, "array_HWC": np.asarray(photo)}
    # those of weights.md are for files of other programs, which `test_tensors.py` makes
    text = "" if document.name == "weights.md" else document.read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        exec(block, names)
