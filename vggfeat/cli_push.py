"""`vggfeat push`: weights or a classifier on the Hugging Face hub, with a card that tells of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from vggfeat.cli_info import model_rows, network_rows
from vggfeat.errors import VggfeatError, WrongUsage, reason
from vggfeat.hub import (
    CARD,
    HUB,
    LIBRARY,
    STEMS,
    Named,
    beside,
    is_repository,
    local_file,
    on_hub,
    push,
    there,
)
from vggfeat.options import with_debug
from vggfeat.terminal import columns, out
from vggfeat.versions import __version__

MOST_CLASSES = 1000  # whose names are in a card
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&])")


@dataclass(frozen=True)
class Shared:
    """What is put into a repository, and told of it.

    what: in words; task, tags: in the hub's. files: name there -> local file. rows: as of
    `vggfeat info`. use: the command that uses it, and python: the lines that do.
    """

    what: str
    task: str
    tags: Sequence[str]
    files: Mapping[str, Path]
    rows: Sequence[tuple[str, str]]
    classes: Sequence[str]
    use: str
    python: str


@with_debug
def push_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help=(
                "A classifier of `vggfeat svm --out` or `classify --out`, or weights, as"
                " timm:NAME@FILE where needed."
            ),
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository of the hub that it goes to.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that others can't see.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the card and what would be sent, and send nothing."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace files and a card that others have put there."),
    ] = False,
) -> None:
    """Put weights or a classifier on the Hugging Face hub, with a card that tells what it is, for
    use as hf:OWNER/NAME.
    """
    if not is_repository(repository):
        raise WrongUsage(f"{repository!r} is no repository of the hub: give OWNER/NAME")
    if on_hub(file):
        raise WrongUsage(f"{file} is on the hub: give a local file")
    from vggfeat.convert import MODEL
    from vggfeat.hdf5 import format_of

    of_model = format_of(Path(file)) == MODEL
    shared = _classifier(Path(file), repository) if of_model else _weights(file, repository)
    sizes = {name: _measured(path) for name, path in shared.files.items()}
    card = card_of(repository, shared, sizes)
    table = columns("file", "bytes", "sha256", numbers=(1,))
    for name, (size, sha256) in sizes.items():
        table.add_row(name, f"{size:,}", sha256[:12])
    table.add_row(CARD, f"{len(card.encode()):,}", "")
    if dry_run:
        out.print(table)
        for line in card.splitlines():
            out.print(line, soft_wrap=True)
        return
    content = {CARD: card.encode()}
    commit = push(repository, {**shared.files, **content}, private=private, overwrite=overwrite)
    out.print(table)
    out.print(f"{Named(repository, revision=commit)}: {shared.use}", soft_wrap=True)


def _classifier(path: Path, repository: str) -> Shared:
    """A saved classifier, and the weights that it was learned with, where they are a local file.
    Raises VggfeatError where they are missing, or others.
    """
    from vggfeat.model import open_model

    model = open_model(path, device="cpu")
    name = f"{STEMS['classifier']}.h5"
    files, parts = {name: path}, []
    for i, part in enumerate(model.parts):
        if own := beside(part.weights, i, len(model.parts)):
            files[own] = Path(local_file(part.weights))
            part = replace(part, weights=there(part.weights, Named(repository, own)))
        parts.append(part)
    if len(files) > 1:
        _ = model.networks  # refused, unless they are the weights that described the images
    told = model_rows(replace(model, parts=tuple(parts)))
    return Shared(
        "An image classifier: a linear one on dense descriptors of a pretrained net",
        "image-classification",
        ("image-classification", "transfer-learning", model.head, *(part.net for part in parts)),
        files,
        [row for row in told if row[0] != "command"],  # which names folders of who gave it
        model.classes,
        f"vggfeat predict photos --model {HUB}{repository}",
        f'model = vggfeat.open_model("{HUB}{repository}")\nprint(model.predict(["photo.jpg"]))',
    )


def _weights(spec: str, repository: str) -> Shared:
    """Weights of a local file. Raises VggfeatError where there is none, or it doesn't fit."""
    from vggfeat.sources import load

    network = load(spec, device="cpu", precision="float32")
    own = beside(network.spec, 0, 1)
    if not own:
        raise WrongUsage(f"{spec} has that name for everybody, and no file: push needs a file")
    path = local_file(network.spec)
    public = there(network.spec, Named(repository))
    named = str(Named(repository, own))
    rows = [(name, value.replace(path, named)) for name, value in network_rows(network)]
    use = "vggfeat extract --dataset folder --root photos --out photos.h5"
    return Shared(
        "A pretrained net for dense image descriptors",
        "image-feature-extraction",
        ("feature-extraction", "transfer-learning", network.name),
        {own: Path(path)},
        rows,
        network.classes or (),
        f"{use} --weights {public}",
        f'net = vggfeat.load("{public}")\nX = vggfeat.embed(net, ["photo.jpg"])  # (1, D)',
    )


def _measured(path: Path) -> tuple[int, str]:
    """Bytes of a file, and their sha256."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise VggfeatError(f"can't read {path}: {reason(error)}") from error


def card_of(repository: str, shared: Shared, sizes: Mapping[str, tuple[int, str]]) -> str:
    """The page of a repository, in Markdown with YAML in front. sizes: name -> bytes, sha256."""
    # JSON's texts are YAML's
    head = [
        "---",
        f"library_name: {LIBRARY}",
        f"pipeline_tag: {shared.task}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys((LIBRARY, *shared.tags))),
        "---",
        "",
        f"# {repository.partition('/')[2]}",
        "",
        f"{shared.what}, by {LIBRARY} {__version__}.",
        "",
    ]
    use = ["```", f"pip install {LIBRARY}", shared.use, "```", ""]
    python = ["```python", f"import {LIBRARY}", "", shared.python, "```", ""]
    facts = ["| | |", "|---|---|"]
    facts += [f"| {_plain(name)} | {_plain(value)} |" for name, value in shared.rows]
    files = ["", "| file | bytes | sha256 |", "|---|---|---|"]
    files += [f"| {_plain(name)} | {n:,} | {sha256} |" for name, (n, sha256) in sizes.items()]
    lines = [*head, *use, *python, *facts, *files]
    if shared.classes:
        names = ", ".join(map(_plain, shared.classes[:MOST_CLASSES]))
        more = len(shared.classes) - MOST_CLASSES
        lines += ["", f"Classes: {names}{f', and {more:,} more' if more > 0 else ''}"]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A text in Markdown that is no markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
