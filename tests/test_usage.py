"""What can be typed: the options of every command, what is said of them, and what is wrong usage.

docs/cli.md is made of the commands by `python -m tests.test_usage`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer

import vggfeat
from pretrain.kept import MODES
from pretrain.trainer import DTYPES
from vggfeat import cli
from vggfeat.aggregate import POOLINGS
from vggfeat.devices import PRECISIONS
from vggfeat.errors import WrongUsage
from vggfeat.protocols import HEADS
from vggfeat.solver import LOSSES
from vggfeat.svm import SOLVERS
from vggfeat.terminal import run

from .conftest import Command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"
PRETRAIN = ("train", "evaluate", "localise", "reproduce", "export", "report")
NET = "random:A,width=0.125,crop=32"

# People's scripts hold these names: renaming or dropping one is a decision, not a slip.
OPTIONS = {
    "vggfeat extract": (
        """--dataset --root --net --weights --layer --scales --mirror --no-mirror --regions
        --max-pool --store --out --engine --shard-rows --address --batch-size --device --precision
        --workers --limit --download --dry-run --overwrite --retry --json --debug"""
    ),
    "vggfeat merge": "features --out --overwrite --debug",
    "vggfeat classify": (
        """--features --head --layer --pool --scales --C --k --temperature --loss --class-weight
        --seed --submission --out --solver --device --workers --overwrite --json --dry-run --ledger
        --debug"""
    ),
    "vggfeat svm": (
        """--features --layer --pool --scales --C --loss --class-weight --seed --submission --out
        --solver --device --workers --overwrite --json --dry-run --ledger --debug"""
    ),
    "vggfeat predict": (
        """source --model --weights --out --scores --threshold --top --batch-size --device --workers
        --overwrite --debug"""
    ),
    "vggfeat explain": (
        """source --out --model --weights --class --top --scales --mirror --no-mirror --device
        --overwrite --debug"""
    ),
    "vggfeat export": "model --to --out --weights --overwrite --debug",
    "vggfeat report": (
        """--results --features --model --root --out --mistakes --weights --evidence
        --no-evidence --json --overwrite --debug"""
    ),
    "vggfeat index": (
        """--features --out --layer --pool --scales --recall --queries --exact --overwrite --json
        --debug"""
    ),
    "vggfeat neighbours": (
        """--features --query --top --layer --pool --scales --exact --probes --candidates --picture
        --root --weights --device --overwrite --json --debug"""
    ),
    "vggfeat info": "file --verify --all --overwrite --json --debug",
    "vggfeat push": "file repository --private --dry-run --overwrite --debug",
    "vggfeat convert": "old new --overwrite --debug",
    "vggfeat datasets": "",
    "vggfeat weights": "",
    "python -m pretrain.train": (
        """--net --data --root --recipe --out --task --boxes --annotations --init --stages --from
        --set --seed --colours --micro-batch --device --precision --workers --compile --no-compile
        --checkpoint-minutes --log-every --dry-run --debug"""
    ),
    "python -m pretrain.reproduce": (
        """--data --root --out --annotations --voc --caltech --recipe --set --seeds --only --ledger
        --dry-run --device --precision --workers --debug"""
    ),
    "python -m pretrain.evaluate": (
        """--weights --from --data --root --split --scales --mode --max-pool --posteriors --table
        --runs --ledger --submission --devkit --json --overwrite --limit --batch-size --device
        --precision --workers --debug"""
    ),
    "python -m pretrain.localise": (
        """--weights --annotations --data --root --split --protocol --scales --classifier
        --posteriors --mode --merge-above --mirror --no-mirror --submission --devkit --page --json
        --ledger --overwrite --limit --batch-size --device --precision --workers --debug"""
    ),
    "python -m pretrain.export": "weights --to --out --overwrite --debug",
    "python -m pretrain.report": "folder --out --overwrite --debug",
}


def commands() -> Iterator[tuple[str, Any, Callable[..., None]]]:
    """What is typed for each command, Typer's command, and the function that it calls."""
    group = typer.main.get_command(cli.app)
    functions = {each.name or each.callback.__name__: each.callback for each in _registered(cli)}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        yield f"vggfeat {name}", command, functions[name]
    for name in PRETRAIN:
        module = importlib.import_module(f"pretrain.{name}")
        [own] = _registered(module)
        yield f"python -m pretrain.{name}", typer.main.get_command(module.app), own.callback


def _registered(module: Any) -> list[Any]:
    return list(module.app.registered_commands)


def options(command: Any) -> list[str]:
    words = [word for p in command.params for word in (*p.opts, *p.secondary_opts)]
    completion = ("--help", "--install-completion", "--show-completion")
    return [word for word in words if word not in completion]


def test_the_options_have_their_names() -> None:
    found = {typed: options(command) for typed, command, _ in commands()}
    assert found == {typed: names.split() for typed, names in OPTIONS.items()}


# --- docs/cli.md ----------------------------------------------------------------------------------


def page() -> str:
    """docs/cli.md, from the commands' parameters: what Typer and rich print of them may change."""
    lines = [
        "# The commands and their options",
        "",
        "Made of the commands by `python -m tests.test_usage`. What a command reads and makes, in"
        " examples: the other documents.",
        "",
    ]
    for typed, command, function in commands():
        about = " ".join(inspect.cleandoc(function.__doc__ or "").split())
        lines += [f"## {typed}", "", *textwrap.wrap(about, 120, break_on_hyphens=False), ""]
        types = inspect.signature(function, eval_str=True).parameters
        for parameter in command.params:
            if set(parameter.opts) & set(options(command)):
                kind = get_args(types[parameter.name].annotation)[0]
                lines += textwrap.wrap(
                    f"- {_told(parameter, kind)}",
                    120,
                    subsequent_indent="  ",
                    break_on_hyphens=False,
                    break_long_words=False,
                )
        lines += [""] if command.params else []
    return "\n".join(lines).rstrip() + "\n"


def _told(parameter: Any, kind: Any) -> str:
    """Names, values, whether it must be given, the words of its help, and its default."""
    several = get_origin(kind) is list
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    values = "|".join(get_args(literal)) if literal else ""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    notes = [
        *([f"`{values}`"] if values else []),
        *(["required"] if parameter.required else []),
        *(["may be given several times"] if several and parameter.opts[0][:2] == "--" else []),
        *(["one or more"] if several and parameter.opts[0][:2] != "--" else []),
    ]
    text = names + (f" ({', '.join(notes)})" if notes else "") + f": {parameter.help}"
    shown = parameter.show_default
    if isinstance(shown, str):
        return f"{text} Default: {shown}."
    default = parameter.default
    if shown and default not in (None, False, []):
        on = parameter.secondary_opts and default is True
        default = f"`{parameter.opts[0] if on else default}`"
        where = f"`${parameter.envvar}`, or " if parameter.envvar else ""
        text += f" Default: {where}{default}."
    return text


def test_the_page_of_the_commands_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make it again: python -m tests.test_usage"


@pytest.mark.parametrize(
    ("command", "option", "there"),
    [
        ("vggfeat svm", "pool", POOLINGS),
        ("vggfeat svm", "loss", LOSSES),
        ("vggfeat svm", "solver", SOLVERS),
        ("vggfeat classify", "head", HEADS),
        ("vggfeat extract", "precision", ("auto", *PRECISIONS)),
        ("python -m pretrain.train", "precision", ("auto", *DTYPES)),
        ("python -m pretrain.evaluate", "mode", (*MODES, "both")),
        ("python -m pretrain.localise", "mode", (*MODES, "both")),
    ],
)
def test_an_option_offers_all_there_is(command: str, option: str, there: Sequence[str]) -> None:
    """It has the names once more, as it is read before NumPy or PyTorch is loaded."""
    [function] = [function for typed, _, function in commands() if typed == command]
    kind = get_args(inspect.signature(function, eval_str=True).parameters[option].annotation)[0]
    [offered] = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    assert set(get_args(offered)) == set(there)


def test_a_command_is_told_in_one_paragraph() -> None:
    """The list of commands breaks its lines where a docstring does."""
    for name, command, _ in commands():
        assert command.help and "\n" not in command.help, name


@pytest.mark.parametrize("typed", OPTIONS)
def test_help_is_in_whole_phrases(typed: str) -> None:
    """A capital letter or a value's name in front, a full stop at the end, and several words."""
    command = next(command for name, command, _ in commands() if name == typed)
    for parameter in command.params:
        if set(parameter.opts) & set(OPTIONS[typed].split()):
            text = parameter.help or ""
            assert text.endswith(".") and len(text.split()) > 3, f"{typed} {parameter.opts}: {text}"


# --- wrong usage ----------------------------------------------------------------------------------

# Told of every command alike: status 2, and a line "COMMAND: what is wrong; see COMMAND --help".
WRONG = {
    "vggfeat nonsense": "'nonsense'",
    "vggfeat extract": "--dataset",
    "vggfeat extract --dataset flickr": "there is no dataset 'flickr'; choose one of voc2007",
    f"vggfeat extract --dataset digits --weights {NET} --nonsense": "--nonsense",
    f"vggfeat extract --dataset digits --weights {NET} --scales a": (
        "'a' is not a list of numbers like 256,384,512"
    ),
    f"vggfeat extract --dataset digits --weights {NET} --scales 16385": "at most 16,384 pixels",
    f"vggfeat extract --dataset digits --weights {NET} --scales 31": (
        "scale 31 is too small: fc7 of net A needs at least 32"
    ),
    f"vggfeat extract --dataset digits --weights {NET} --layer pool5,": (
        "'pool5,' is not a list of layers like pool5,fc7"
    ),
    f"vggfeat extract --dataset digits --weights {NET} --layer fc7,fc7": "has a layer twice",
    f"vggfeat extract --dataset digits --weights {NET} --layer pool5,fc9": "have no layer 'fc9'",
    f"vggfeat extract --dataset digits --weights {NET} --layer pool4,fc7 --scales 31": (
        "scale 31 is too small: fc7 of net A needs at least 32"
    ),
    f"vggfeat extract --dataset digits --weights {NET} --scales 32.5": "is not a list of numbers",
    f"vggfeat extract --dataset digits --weights {NET} --scales 3_2": "is not a list of numbers",
    f"vggfeat extract --dataset digits --weights {NET} --scales 32,": "is not a list of numbers",
    f"vggfeat extract --dataset digits --weights {NET} --scales 32,-48": "not positive",
    f"vggfeat extract --dataset digits --weights {NET} --scales 32,32": "a number twice",
    f"vggfeat extract --dataset digits --weights {NET} --batch-size 0": "--batch-size",
    f"vggfeat extract --dataset digits --weights {NET} --workers 0": "--workers",
    f"vggfeat extract --dataset digits --weights {NET} --limit 0": "--limit",
    f"vggfeat extract --dataset digits --weights {NET} --store float64": "--store",
    f"vggfeat extract --dataset digits --weights {NET} --precision int8": "--precision",
    f"vggfeat extract --dataset digits --weights {NET} --device tpu9": "there is no device 'tpu9'",
    f"vggfeat extract --dataset digits --weights {NET} --device meta": "give auto, cpu, cuda",
    f"vggfeat extract --dataset digits --weights {NET} --download": (
        "there is nothing to download for digits, it comes with scikit-learn: leave out --download"
    ),
    "vggfeat extract --dataset folder --root . --download": "leave out --download",
    "vggfeat extract --dataset csv --root l.csv --download": "leave out --download",
    "vggfeat extract --dataset digits --net C": "no weights were released for net C",
    "vggfeat extract --dataset digits --weights oxford:C": "there are oxford:D and oxford:E",
    "vggfeat extract --dataset digits --weights torchvision:": "which of torchvision's are meant",
    "vggfeat extract --dataset digits --weights alexnet": "weights 'alexnet' are not known",
    "vggfeat extract --dataset digits --weights random:Z": "there is no net 'Z'; Table 1 has A",
    "vggfeat extract --dataset digits --weights random:A,depth=3": "has a setting 'depth=3'",
    "vggfeat extract --dataset digits --weights random:A,seed=-1": "has a setting 'seed=-1'",
    "vggfeat extract --dataset digits --weights random:A,crop=33": "33",
    "vggfeat extract --dataset digits --weights random:A@w.pth": "not from a file",
    "vggfeat extract --dataset digits --weights oxford:D@": "no file behind the @",
    "vggfeat extract --dataset digits --weights mini:C": "no mini weights 'C': give mini:A",
    "vggfeat extract --dataset digits --weights mini:D@w.pth": "mini:D, or the file alone",
    "vggfeat extract --dataset digits --weights torchvision:vgg17": "is not a net of Table 1",
    "vggfeat extract --dataset digits --weights torchvision:vgg16.X": "has no weights 'X'",
    "vggfeat extract --dataset digits --weights timm:no-such-model": "timm has no model",
    f"vggfeat extract --dataset digits --weights {NET} --net D": "hold net A, not D",
    "vggfeat extract --dataset digits --weights oxford:D@w.pth --net E": "hold net D, not E",
    "vggfeat extract --dataset digits --weights torchvision:vgg16 --net A": "hold net D, not A",
    "vggfeat extract --dataset digits --weights timm:resnet18 --net A": "hold net resnet18, not A",
    "vggfeat extract --dataset digits --weights w.safetensors --net Z": "there is no net 'Z'",
    f"vggfeat extract --dataset digits --weights {NET} --layer pool6": (
        "have no layer 'pool6': give --layer one of conv1_1"
    ),
    f"vggfeat extract --dataset digits --weights {NET} --layer conv3_4": "have no layer 'conv3_4'",
    "vggfeat extract --dataset digits --layer fc7x": "weights oxford:D have no layer 'fc7x'",
    "vggfeat extract --dataset digits --weights w.safetensors --layer fc7x": "no layer 'fc7x'",
    "vggfeat extract --dataset digits --weights w.pth --net A --layer conv3_4": "no layer",
    "vggfeat extract --dataset digits --weights timm:resnet18 --layer fc7": "one of features",
    "vggfeat extract --dataset digits --weights timm:resnet18 --max-pool ceil": (
        "timm:resnet18 is no net of Table 1: its pooling can't be set"
    ),
    "vggfeat extract --dataset digits --weights timm:resnet18 --scales 16": (
        "scale 16 is too small: features of net resnet18 needs at least 32"
    ),
    "vggfeat extract --dataset digits --weights oxford:D --scales 16": (
        "scale 16 is too small: fc7 of net D needs at least 224"
    ),
    "vggfeat extract --dataset digits --net E --layer pool5 --scales 16 --max-pool floor": (
        "scale 16 is too small: pool5 of net E needs at least 32"
    ),
    "vggfeat extract --dataset digits --weights oxford:D@w.pth --layer fc6 --scales 223": (
        "scale 223 is too small: fc6 of net D needs at least 224"
    ),
    "vggfeat extract --dataset csv --weights torchvision:vgg16.IMAGENET1K_FEATURES --layer fc7": (
        "have no layer 'fc7': give --layer one of conv1_1"
    ),
    "vggfeat extract --dataset digits --root data": (
        "there is nothing to read for digits, it comes with scikit-learn: leave out --root"
    ),
    "vggfeat extract --dataset folder --retry --dry-run": "leave out --retry",
    "vggfeat extract --dataset folder --retry --overwrite": "leave out --overwrite",
    "vggfeat extract --dataset folder --out a --json ./a": "--out and --json are one file",
    "vggfeat extract --dataset folder --out a --json a --dry-run": "are one file",
    "vggfeat extract --dataset folder --root a --out a": "--out a is what the command reads",
    "vggfeat extract --dataset imagenet --download": "leave out --download",
    "vggfeat extract --dataset folder --engine ray": "--engine is for a set of shards: give --out",
    "vggfeat extract --dataset folder --shard-rows 9": "--shard-rows is for a set of shards",
    "vggfeat extract --dataset folder --out s/ --address auto": "give --engine ray",
    "vggfeat extract --dataset folder --out s/ --overwrite": "a shard that is there stays",
    "vggfeat extract --dataset folder --out s/ --retry": "a shard that is there stays",
    "vggfeat extract --dataset folder --out s/ --engine slurm": "task of a job array: `sbatch",
    "vggfeat extract --dataset folder --out s/ --engine slurm --workers 2": "leave out --workers",
    "vggfeat extract --dataset folder --out s/ --engine dask": "--engine",
    "vggfeat extract --dataset folder --out s/ --shard-rows 0": "--shard-rows",
    f"vggfeat extract --dataset webdataset --root 0.tar --weights {NET}": "into a set of shards",
    f"vggfeat extract --dataset webdataset --root 0.tar --weights {NET} --out s/ --dry-run": (
        "--dry-run looks at images' headers here: leave it out"
    ),
    f"vggfeat extract --dataset webdataset --root 0.tar --weights {NET} --out s/ --shard-rows 9": (
        "each file of images is a shard: leave out --shard-rows"
    ),
    f"vggfeat extract --dataset webdataset --root 0.tar --weights {NET} --out s/ --limit 9": (
        "--limit counts images"
    ),
    "vggfeat extract --dataset caltech101 --root s3://b --download": (
        "into a folder of this machine"
    ),
    "vggfeat merge s": "--out",
    "vggfeat merge --out f.h5": "missing argument 'set'",
    "vggfeat classify": "--features",
    "vggfeat classify --features f.h5 --head x": "--head",
    "vggfeat classify --features f.h5 --head knn --C 1": "--C is of --head svm or logistic",
    "vggfeat classify --features f.h5 --head ridge --loss hinge": "--loss is of --head svm, not",
    "vggfeat classify --features f.h5 --head ridge --dry-run": "--dry-run is of --head svm, not",
    "vggfeat classify --features f.h5 --head ridge --device cpu": "--device is of --head svm",
    "vggfeat classify --features f.h5 --k 3": "--k is of --head knn, not svm",
    "vggfeat classify --features f.h5 --head knn --out m": "no classifier that is saved",
    "vggfeat classify --features f.h5 --head knn --temperature 0": "--temperature",
    "vggfeat svm": "--features",
    "vggfeat svm --features f.h5 --features ./f.h5": "--features ./f.h5 is given twice",
    "vggfeat svm --features f.h5 --features f.h5 --layer fc7": "--features f.h5 is given twice",
    "vggfeat svm --features f.h5 --out a --json a": "--out and --json are one file, a",
    "vggfeat svm --features f.h5 --out a --submission a": "--out and --submission are one file",
    "vggfeat svm --features f.h5 --ledger f.h5": "--ledger f.h5 is what the command reads",
    "vggfeat svm --features f.h5 --json f.h5": "--json f.h5 is what the command reads",
    "vggfeat svm --features f.h5 --solver liblinear --device cpu": "leave out --device",
    "vggfeat svm --features f.h5 --solver liblinear --workers 2": "leave out --workers",
    "vggfeat svm --features f.h5 --solver liblinear --dry-run": "leave out --solver liblinear",
    "vggfeat svm --features f.h5 --out a --json a --dry-run": "--out and --json are one file, a",
    "vggfeat svm --features f.h5 --ledger f.h5 --dry-run": "f.h5 is what the command reads",
    "vggfeat svm --features f.h5 --device tpu9": "there is no device 'tpu9'",
    "vggfeat svm --features f.h5 --scales 99999": "at most 16,384 pixels",
    "vggfeat svm --features f.h5 --C 1e300": "numbers from 1e-12 to 1e+12",
    "vggfeat svm --features": "'--features' requires an argument",
    "vggfeat svm --features f.h5 --pool x": "--pool",
    "vggfeat svm --features f.h5 --scales a": "is not a list of numbers",
    "vggfeat svm --features= --scales=": "'--features': it is empty",
    "vggfeat svm --features f.h5 --C a": "'a' is not a list of numbers like 1,4,16",
    "vggfeat svm --features f.h5 --C 1,0": "not positive",
    "vggfeat svm --features f.h5 --C nan": "not positive",
    "vggfeat svm --features f.h5 --C inf": "finite",
    "vggfeat svm --features f.h5 --loss log": "--loss",
    "vggfeat svm --features f.h5 --seed -1": "--seed",
    "vggfeat explain --model m.h5 --out p.html": "source",
    "vggfeat explain a.jpg --model m.h5": "--out",
    "vggfeat explain a.jpg --model m.h5 --out p.svg": "must end in .html or .png, or be a folder",
    "vggfeat explain a.jpg --out p.html": "give --model, or --weights of a net whose own scores",
    f"vggfeat explain a.jpg --weights {NET} --weights mini --out p.html": "is of one net: give one",
    "vggfeat explain a.jpg --model m.h5 --scales 256 --out p.html": "are of a net alone",
    "vggfeat explain a.jpg --model m.h5 --no-mirror --out p.html": "are of a net alone",
    "vggfeat explain a.jpg --model m.h5 --class a --top 2 --out p.html": "give one of them",
    "vggfeat explain a.jpg --model m.h5 --class a --class a --out p.html": "is given twice",
    "vggfeat explain a.png --model m.h5 --out a.png": "is what the command reads",
    "vggfeat predict --model m.h5": "source",
    "vggfeat predict a.jpg": "--model",
    "vggfeat predict a.jpg --model m.h5 --top 0": "--top",
    "vggfeat predict a.csv --model m.h5 --out a.csv": "is what the command reads",
    "vggfeat predict a.jpg --model m.h5 --out a.txt": "must end in .csv, .jsonl or .parquet",
    "vggfeat predict a.jpg --model m.h5 --scores": "--scores is of the file that --out names",
    "vggfeat predict a.jpg --model m.h5 --out a.csv --top 2": "--top is of what is printed",
    "vggfeat predict a.jpg --model m.h5 --threshold nan": "must be a finite number, not nan",
    "vggfeat predict a.jpg --model m.h5 --threshold x": "--threshold",
    "vggfeat predict a.jpg --model m.h5 --device tpu9": "there is no device 'tpu9'",
    "vggfeat export --to npz --out n.npz": "model",
    "vggfeat export m.h5 --out n.npz": "--to",
    "vggfeat export m.h5 --to npz": "--out",
    "vggfeat export m.h5 --to npz --out n.onnx": "--out n.onnx must end in .npz",
    "vggfeat export m.h5 --to npz --out n.npz --weights w.pth": "--weights is for --to onnx",
    "vggfeat export m.onnx --to onnx --out m.onnx": "is what the command reads",
    "vggfeat report": "a report needs --results or --model",
    "vggfeat report --model m.h5 --weights w.pth": "--weights are for the evidence, of --model",
    "vggfeat report --model m.h5 --evidence": "--evidence is shown of --model and --features",
    "vggfeat report --model m.h5 --json j.json": "--json is of the images that --features knows",
    "vggfeat report --model m.h5 --root images": "--root is of the images that --features knows",
    "vggfeat report --model m.h5 --mistakes m.csv": "--mistakes needs --model and --features",
    "vggfeat report --model m.h5 --out m.h5": "is what the command reads",
    "vggfeat index --features f.h5": "--out",
    "vggfeat index --features f.h5 --out f.h5": "is what the command reads",
    "vggfeat index --features f.h5 --out i --recall 1.5": "--recall must lie in 0..1, not 1.5",
    "vggfeat index --features f.h5 --out i --exact --queries q.h5": "are for lists",
    "vggfeat index --features f.h5 --out i --exact --recall 0.5": "and --exact makes none",
    "vggfeat neighbours --features f.h5": "--query",
    "vggfeat neighbours --features f.h5 --query q --exact --probes 9": "leave out --probes",
    "vggfeat neighbours --features f.h5 --query q --scales 3x": "is not a list of numbers",
    "vggfeat neighbours --features f.h5 --query q --picture q.txt": "must end in .png",
    "vggfeat neighbours --features f.h5 --query q --root images": "--picture draws",
    "vggfeat neighbours --features f.h5 --query q --json q": "is what the command reads",
    "vggfeat neighbours --features f.h5 --query q --device tpu9": "there is no device 'tpu9'",
    "vggfeat info": "file",
    "vggfeat info f.h5 --json f.h5": "is what the command reads",
    "vggfeat info D --verify": "--verify is for a feature file: leave it out",
    "vggfeat convert old.h5": "new",
    "vggfeat convert old.h5 old.h5": "is what the command reads",
    "vggfeat datasets all": "all",
    "vggfeat weights all": "all",
    "pretrain.train --net Z": "there is no net 'Z'; Table 1 has A",
    "pretrain.train --recipe nonsense": "there is no recipe 'nonsense'",
    "pretrain.train --init zero": "--init must be one of A, normal, glorot",
    "pretrain.train --set bad": "--set bad: write KEY=VALUE",
    "pretrain.train --set .seed=1": "--set .seed=1: write KEY=VALUE",
    "pretrain.train --set file=x": "write STAGE.KEY=VALUE, STAGE one of A-256, NET-256",
    "pretrain.train --set learning_rate=1": "learning_rate is a stage's",
    "pretrain.train --set *.seed=1": "seed is of the whole recipe",
    "pretrain.train --set *.depth=3": "can't have 'depth'",
    "pretrain.train --set width=16": "million parameters",
    "pretrain.train --set *.train_scale=[64,64]": "smaller than the crop of 224",
    "pretrain.train --set mean=[0,0,0] --set covariance=[[1,0,0],[0,1,0],[0,0,1]] --colours c": (
        "leave out --colours"
    ),
    "pretrain.train --set seed=1 --seed 2": "--seed and --set seed are one number",
    "pretrain.train --set random_layers=normal --init glorot": "leave out --set random_layers",
    "pretrain.train --net B --set '*.nets=[\"A\"]'": "has no stage for net B",
    "pretrain.train --from runs/D/weights.safetensors": "is what the command reads",
    "pretrain.train --set depth=3": "can't have 'depth'",
    "pretrain.train --set seed=x": "seed must be a whole number",
    "pretrain.train --set width=-1": "width must lie in",
    "pretrain.train --set Z-256.learning_rate=1": "there is no stage 'Z-256'",
    "pretrain.train --set A-256.learning_rate=-1": "learning_rate must be positive",
    "pretrain.train --set A-256.learn=fc7": "learn must be all, fc or fc8, not 'fc7'",
    "pretrain.train --stages 9": "--stages 9: there is no stage '9'",
    "pretrain.train --stages 3-1": "A-256 comes before D-384",
    "pretrain.train --seed -1": "--seed",
    "pretrain.train --device tpu": "--device",
    "pretrain.train --precision half": "--precision",
    "pretrain.train --micro-batch -1": "--micro-batch",
    "pretrain.train --checkpoint-minutes nan": "nan is not a number of minutes",
    "pretrain.train --checkpoint-minutes -1": "-1.0 is not a number of minutes",
    "pretrain.train --log-every 0": "--log-every",
    "pretrain.train photos": "photos",
    "pretrain.train --boxes scr": "--task localisation and --boxes scr or pcr go together",
    "pretrain.train --task localisation --boxes scr": "--annotations, the true boxes, go together",
    "pretrain.train --task control": "recipe paper has no stage of control for net D",
    "pretrain.reproduce --only 'table 2'": "give tables of the paper from 3 to 12",
    "pretrain.reproduce --only 'table 8'": "table 8 needs --annotations",
    "pretrain.reproduce --only 'table 3' --voc d": "--voc is for table 11 and table 12: leave it",
    "pretrain.reproduce --seeds 1,x": "give whole numbers, as 0,1,2",
    "pretrain.reproduce --seeds 1,1": "--seeds 1,1: each once",
    "pretrain.reproduce --recipe nonsense": "there is no recipe 'nonsense'",
    "pretrain.evaluate": "give one of --weights, --from and --table",
    "pretrain.evaluate --weights mini --from k.h5": "give one of --weights, --from and --table",
    "pretrain.evaluate --weights mini --scales 3x": "is not a list of numbers like 256,384,512",
    "pretrain.evaluate --weights mini --scales 256,": "is not a list of numbers",
    "pretrain.evaluate --weights mini --scales -4": "not positive",
    "pretrain.evaluate --weights mini --scales 36,50,36": "a number twice",
    "pretrain.evaluate --weights mini --split all": "--split",
    "pretrain.evaluate --weights mini --mode scales": "--mode",
    "pretrain.evaluate --weights mini --device tpu": "--device",
    "pretrain.evaluate --weights mini --limit -1": "--limit",
    "pretrain.evaluate --weights mini --submission s.txt": "--submission needs --devkit",
    "pretrain.evaluate --weights mini --weights mini": "--weights mini is given twice",
    "pretrain.evaluate --weights a.pth --weights ./a.pth": "--weights ./a.pth is given twice",
    "pretrain.evaluate --weights mini --scales 99999": "at most 16,384 pixels",
    "pretrain.evaluate --weights mini --posteriors a --json a": "are one file",
    "pretrain.evaluate --weights mini --devkit d": "--devkit is for --submission",
    "pretrain.evaluate --weights mini --runs r": "--runs is for --table",
    "pretrain.evaluate --weights mini --ledger r.md": "--ledger is for --table",
    "pretrain.evaluate --from k.h5 --from k.h5": "--from k.h5 is given twice",
    "pretrain.evaluate --from k.h5 --posteriors k.h5": "is what the command reads",
    "pretrain.evaluate --from k.h5 --data d": "--data is for what is measured now",
    "pretrain.evaluate --from k.h5 --split val": "--split is for what is measured now",
    "pretrain.evaluate --from k.h5 --limit 2": "--limit is for what is measured now",
    "pretrain.evaluate --from k.h5 --batch-size 2": "--batch-size is for what is measured now",
    "pretrain.evaluate --from k.h5 --device cpu": "--device is for what is measured now",
    "pretrain.evaluate --from k.h5 --precision float32": "--precision is for what is measured now",
    "pretrain.evaluate --from k.h5 --workers 2": "--workers is for what is measured now",
    "pretrain.evaluate --from k.h5 --table 3 --runs r": "--runs is for what is measured now",
    "pretrain.evaluate --table 3 --mode dense": "no --scales, --mode",
    "pretrain.evaluate --from k.h5 --max-pool ceil": "--max-pool is for --weights",
    "pretrain.evaluate --weights timm:resnet18 --max-pool ceil": "its pooling can't be set",
    "pretrain.evaluate --table 9": "the paper's tables of classes are 3 to 7",
    "pretrain.evaluate --table 3 --split test": "no --split test",
    "pretrain.evaluate --table 3 --scales 36": "no --scales, --mode, --submission or --json",
    "pretrain.localise": "--weights",
    "pretrain.localise --weights l.pth": "give --annotations, with the true boxes, or --submission",
    "pretrain.localise --weights l.pth --weights ./l.pth --annotations b.csv": "is given twice",
    "pretrain.localise --weights l.pth --annotations b.csv --protocol 3": "--protocol",
    "pretrain.localise --weights l.pth --annotations b.csv --protocol 2": (
        "--protocol 2 needs the classes of each image: --classifier or --posteriors"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --scales 36,50": "give --scales one Q",
    "pretrain.localise --weights l.pth --annotations b.csv --scales 36 --scales 50": (
        "--scales is there 2 times: give it once, or once a net"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --scales 3x": "is not a list of numbers",
    "pretrain.localise --weights l.pth --annotations b.csv --split test": (
        "--split test has no labels to judge by"
    ),
    "pretrain.localise --weights l.pth --split test --submission s.txt": (
        "--protocol 1 takes the true class"
    ),
    "pretrain.localise --weights l.pth --classifier mini --submission s.txt": (
        "--submission needs --devkit"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --protocol 1 --classifier mini": (
        "--classifier is for --protocol 2"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --no-mirror": (
        "--mirror is for --protocol 2"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --merge-above 0.3": (
        "--merge-above is for --protocol 2"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --merge-above 1.5": "--merge-above",
    "pretrain.localise --weights l.pth --annotations b.csv --classifier mini --mode dense": (
        "--mode is for --posteriors"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --ledger r.md --limit 9": (
        "--ledger is of the whole validation set"
    ),
    "pretrain.localise --weights l.pth --annotations b.csv --devkit d": "--devkit is for --submiss",
    "pretrain.localise --weights l.pth --annotations b.csv --json b.csv": "is what the command rea",
    "pretrain.localise --weights l.pth --annotations b.csv --page a --json a": "are one file",
    "pretrain.export": "weights",
    "pretrain.export mini": "--to",
    "pretrain.export mini --to timm": "--out",
    "pretrain.export mini --to x --out n.pth": "--to",
    "pretrain.export mini --to onnx --out n.pth": "--out n.pth must end in .onnx",
    "pretrain.export mini --to timm --out n.bin": "must end in .pth or .safetensors",
    "pretrain.export alexnet --to timm --out n.pth": "weights 'alexnet' are not known",
    f"pretrain.export {NET} --to timm --out n.pth": "at width 1 and crop 224 only",
    "pretrain.export w.pth --to timm --out w.pth": "is what the command reads",
    "vggfeat info hf:net": "names nothing on the hub: give hf:OWNER/NAME",
    "vggfeat push m.h5 net": "is no repository of the hub: give OWNER/NAME",
    "vggfeat push hf:me/net me/other": "hf:me/net is on the hub: give a local file",
    f"vggfeat push {NET} me/net": "push needs a file",
    "pretrain.report": "folder",
    "pretrain.report runs --out runs": "is what the command reads",
}
# Raised for who calls the library: a command refuses the same before, or can't ask for it.
LIBRARY = {
    "vggfeat/describe.py description_of",
    "vggfeat/devices.py resolve_precision",
    "vggfeat/report.py write_report",
    "vggfeat/protocols.py grid_of",
}

# What was typed could be right: status 1, and a line "COMMAND: what is wrong".
ABSENT = {
    "vggfeat extract --dataset folder --root nowhere": "/nowhere: check --root",
    f"vggfeat extract --dataset digits --weights {NET} --device cuda": "give --device cpu",
    "vggfeat extract --dataset digits --weights w.safetensors --net D": "no weights file at",
    "vggfeat extract --dataset digits --weights w.safetensors --layer conv5_4": "no weights file",
    "vggfeat svm --features f.h5": "no feature file at f.h5",
    "vggfeat predict a.jpg --model m.h5": "no model file at m.h5",
    "vggfeat export m.h5 --to npz --out n.npz": "no model file at m.h5",
    "vggfeat report --model m.h5": "no model file at m.h5",
    "vggfeat index --features f.h5 --out f.index": "no feature file at f.h5",
    "vggfeat neighbours --features f.h5 --query q": "no feature file at f.h5",
    "vggfeat info f.h5": "no feature file at f.h5",
    "vggfeat push m.h5 me/net": "no weights file at m.h5",
    "vggfeat convert f.h5 n.h5": "f.h5",
    "pretrain.train --recipe own.toml": "no recipe at own.toml",
    "pretrain.train --data nowhere": "no folder",
    "pretrain.evaluate --weights mini --data nowhere": "no folder",
    "pretrain.evaluate --from k.h5": "k.h5",
    "pretrain.localise --weights l.pth --annotations b.csv --data nowhere": "no folder",
    "pretrain.export w.safetensors --to timm --out n.pth": "no weights file at w.safetensors",
    "pretrain.export mini --to timm --out no/n.pth": "there is no folder no to write n.pth in",
    "pretrain.report nowhere": "no stage with a log.jsonl under nowhere",
}


# Line -> where WrongUsage was raised when it was run, as (file, line number).
_RAISED: dict[str, set[tuple[str, int]]] = {}


@pytest.fixture
def typed(run_main: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A line, as it is typed in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VGGFEAT_DATA", raising=False)
    running: list[str] = []

    def record(error: WrongUsage, *args: object) -> None:
        place = sys._getframe(1)
        _RAISED[running[-1]].add((place.f_code.co_filename, place.f_lineno))
        Exception.__init__(error, *args)

    monkeypatch.setattr(WrongUsage, "__init__", record)

    def run_line(line: str) -> Any:
        running.append(line)
        _RAISED[line] = set()
        program, *words = shlex.split(line)
        if program == "vggfeat":
            return run_main(cli.main, *words)
        app = importlib.import_module(program).app
        return run_main(functools.partial(run, app, f"python -m {program}"), *words)

    return run_line


@pytest.mark.parametrize("line", WRONG)
def test_what_is_typed_wrong_has_status_2(line: str, typed: Command, tmp_path: Path) -> None:
    ran = typed(line)
    assert (ran.status, ran.out, len(ran.err_lines)) == (2, "", 1), ran.err
    [told] = ran.err_lines
    program, *words = line.split()
    names = ["", *(name.removeprefix("vggfeat ") for name in OPTIONS)]
    name = f"{program} {words[0]}" if words and words[0] in names else program
    assert told.startswith(f"{name}: "), told
    full = name if program == "vggfeat" else f"python -m {name}"
    assert told.endswith(f"; see {full} --help"), told
    assert WRONG[line].lower() in told.lower() and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def _refusals() -> Iterator[tuple[str, str, int, int]]:
    """Wherever WrongUsage is made: file, function, and its first and last line."""
    for path in sorted([*ROOT.glob("vggfeat/**/*.py"), *ROOT.glob("pretrain/*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WrongUsage":
                    assert node.end_lineno is not None
                    name = f"{path.relative_to(ROOT)} {function.name}"
                    yield str(path), name, node.lineno, node.end_lineno


def test_every_refusal_of_what_is_typed_is_among_the_lines(typed: Command) -> None:
    for line in WRONG:
        if line not in _RAISED:
            typed(line)
    raised = set().union(*_RAISED.values())
    refusals = list(_refusals())
    assert {name for _, name, _, _ in refusals} >= LIBRARY
    missing = {
        f"{name}, line {first}"
        for path, name, first, last in refusals
        if name not in LIBRARY and not any((path, n) in raised for n in range(first, last + 1))
    }
    assert not missing, "give each a line in WRONG"


def _empty() -> Iterator[str]:
    """Every command with nothing for each of its values in turn, and words for what it needs."""
    for name, command, _ in commands():
        needed = [
            word
            for p in command.params
            if p.required
            for word in ([p.opts[0]] if p.opts[0][:2] == "--" else []) + ["x"]
        ]
        for p in command.params:
            if p.opts[0] in OPTIONS[name].split() and not getattr(p, "is_flag", False):
                option = p.opts[0][:2] == "--"
                words = [*needed, p.opts[0], ""] if option else [""]
                yield f"{name.removeprefix('python -m ')} {shlex.join(words)}"


@pytest.mark.parametrize("line", list(_empty()))
def test_nothing_is_no_value(line: str, typed: Command, tmp_path: Path) -> None:
    ran = typed(line)
    assert (ran.status, ran.out, len(ran.err_lines)) == (2, "", 1), ran.err
    assert "it is empty" in ran.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ABSENT)
def test_what_is_not_there_has_status_1(line: str, typed: Command, tmp_path: Path) -> None:
    ran = typed(line)
    assert (ran.status, ran.out, len(ran.err_lines)) == (1, "", 1), ran.err
    program = line.split()[0]
    assert ran.err.startswith(f"{program}: ") and ABSENT[line] in ran.err
    assert not ran.err.rstrip().endswith("--help")
    assert not list(tmp_path.iterdir())


def test_nothing_typed_prints_the_help(typed: Command) -> None:
    ran = typed("vggfeat")
    assert ran.status == 2 and "extract" in ran.out + ran.err


def test_wrong_usage_is_an_error_of_the_library_too() -> None:
    """Who catches VggfeatError in Python catches it."""
    with pytest.raises(vggfeat.VggfeatError, match="are not known"):
        vggfeat.load("alexnet")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
